"""Phases read nothing back, are whole graphs, and may be recorded."""

import os
import shutil

import pytest
import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch._inductor import config as inductor
from torch._inductor import metrics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from driving import act, train_offsets, wrap
from fast_path import FLOWS, ROUNDING, apart, small
from lerobot_policy_grids.errors import UnsupportedPolicyError
from lerobot_policy_grids.families import seam as seams
from lerobot_policy_grids.runtime import graphs, program


@pytest.fixture
def built(monkeypatch):
    """Collects (phases, observation, noise) of each program."""
    found = []
    make = program.Program.__init__

    def spy(self, phases, steps, observation, noise, **options):
        found.append((phases, observation, noise))
        make(self, phases, steps, observation, noise, **options)

    monkeypatch.setattr(program.Program, "__init__", spy)
    return found


class NoReading(TorchDispatchMode):
    """Fails where a value is read back, or a shape depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero"), func
        return func(*args, **(kwargs or {}))


def run_phases(phases, observation, noise, wrapped=lambda phase, *inputs: phase):
    """(Cache, velocity), each phase wrapped with its inputs."""
    number = torch.tensor([1])
    cache = wrapped(phases.prefill, *observation)(*observation)
    return cache, wrapped(phases.denoise_step, cache, noise, number)(cache, noise, number)


def exported(phase, *inputs):
    return torch.export.export(phase, inputs, strict=False).module()


def compiled(phase, *inputs):
    return torch.compile(phase, fullgraph=True, dynamic=False, backend="eager")


@torch.no_grad()
def test_phases_read_nothing_back_and_are_whole_graphs(phased, built):
    policy, batch = phased
    policy.use_runtime("fast")
    act(policy, batch)
    ((phases, observation, noise),) = built
    with NoReading():
        cache, velocity = run_phases(phases, observation, noise)
    for wrapped in (exported, compiled):
        torch.compiler.reset()
        other_cache, other = run_phases(phases, observation, noise, wrapped)
        assert torch.equal(other, velocity)
        assert all(map(torch.equal, tree_leaves(other_cache), tree_leaves(cache)))


@torch.no_grad()
def test_a_phase_that_reads_a_value_is_found(pi0, built, monkeypatch):
    policy, batch = pi0
    policy.use_runtime("fast")
    act(policy, batch)
    ((phases, observation, noise),) = built
    gather = seams.gather_context

    def reading(condition_on, batch, **options):
        assert float(batch["observation.state"].abs().max()) >= 0
        return gather(condition_on, batch, **options)

    monkeypatch.setattr(seams, "gather_context", reading)
    torch.compiler.reset()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        run_phases(phases, observation, noise)
    for wrapped in (exported, compiled):
        with pytest.raises(Exception, match=r"data-dependent|scalar|Unsupported"):
            run_phases(phases, observation, noise, wrapped)


@torch.no_grad()
def test_fast_path_samples_inside_the_tower_too(tower_family, built):
    policy = tower_family.policy(2)
    batch = tower_family.batch(policy)
    policy = train_offsets(wrap(policy, 4, sample_after_layer=1))
    expected = act(policy, batch)
    try:
        policy.use_runtime("fast")
    except UnsupportedPolicyError:
        return
    act(policy, batch)
    assert apart(expected, act(policy, batch)) < ROUNDING
    ((phases, observation, _),) = built
    with NoReading():
        cache = phases.prefill(*observation)
    # The denoising step is the module that it is without.
    for wrapped in (exported, compiled):
        torch.compiler.reset()
        other = wrapped(phases.prefill, *observation)(*observation)
        assert all(map(torch.equal, tree_leaves(other), tree_leaves(cache)))


class OnTheDevice(TorchDispatchMode):
    """Fails where a tensor is on the CPU: it would be copied to the GPU at each call, or could not be recorded."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        assert all(value.device.type == "cuda" for value in tensors), func
        return result


def run_on_a_gpu_that_is_not_there(phases, observation, noise):
    mode = FakeTensorMode()

    def fake(value):
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    for module in {*phases.prefill.modules(), *phases.denoise_step.modules()}:
        for name, weight in module._parameters.items():
            if weight is not None and not weight.is_cuda:
                module._parameters[name] = torch.nn.Parameter(fake(weight), requires_grad=False)
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else fake(value)
    # A module that both phases have is done once.
    observation, noise, number = (tree_map(fake, value) for value in (observation, noise, torch.tensor([1])))
    with torch.no_grad(), mode, OnTheDevice():
        return phases.denoise_step(phases.prefill(*observation), noise, number)


def test_phases_copy_nothing_to_a_gpu(phased, built):
    policy, batch = phased
    # The one with the most in it: a tower of another precision than what is around it.
    policy.use_runtime("fast", precision="bf16")
    act(policy, batch)
    assert run_on_a_gpu_that_is_not_there(*built[0]).is_cuda


def test_a_phase_that_copies_to_a_gpu_is_found(pi0, built, monkeypatch):
    policy, batch = pi0
    policy.use_runtime("fast")
    act(policy, batch)
    gather = seams.gather_context

    def copying(condition_on, batch, **options):
        state = batch["observation.state"]
        return gather(condition_on, batch | {"observation.state": state + torch.tensor([1.0]).to(state)}, **options)

    monkeypatch.setattr(seams, "gather_context", copying)
    with pytest.raises(AssertionError, match=r"aten\."):
        run_on_a_gpu_that_is_not_there(*built[0])


# Each of its kernels is compiled by g++ on its own, which takes a minute of CPU time or more.
INDUCTOR = os.environ.get("GRIDS_TEST_INDUCTOR") == "1" and shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.skipif(not INDUCTOR, reason="takes a minute, and a C++ compiler; GRIDS_TEST_INDUCTOR=1 runs it")
@torch.no_grad()
def test_what_inductor_makes_of_a_step_acts_as_it_does(family_row, built, tmp_path, monkeypatch):
    policy, batch = small(family_row("tiny_smolvla"))
    policy.use_runtime("fast")
    act(policy, batch)
    ((phases, observation, noise),) = built
    cache, velocity = run_phases(phases, observation, noise)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    metrics.reset()
    with inductor.patch(compile_threads=1):
        step = torch.compile(phases.denoise_step, fullgraph=True, dynamic=False)
        found = step(cache, noise, torch.tensor([1]))
    assert 0 < apart(velocity, found) < ROUNDING
    assert apart(velocity, step(cache, noise, torch.tensor([0]))) > 10 * ROUNDING
    # Beside products and attention, which are no kernels of its own: 33 with 2 layers, and 27 for one robot.
    assert 0 < metrics.generated_kernel_count <= 36


class Overwriting:
    """`RecordedFunction` without a GPU: inputs and outputs stay at their places, and each call overwrites them."""

    def __init__(self, function, fixed, examples):
        self.places = tree_map(torch.clone, examples)
        self.run = lambda: function(*fixed, *self.places)
        self.result = tree_map(torch.clone, self.run())

    def __call__(self, *arguments):
        for place, value in zip(tree_leaves(self.places), tree_leaves(arguments), strict=True):
            place.copy_(value)
        for place, value in zip(tree_leaves(self.result), tree_leaves(self.run()), strict=True):
            place.copy_(value)
        return self.result


@pytest.mark.parametrize("guided", [False, True])
def test_results_that_the_next_call_overwrites_are_used_before(phased, guided, monkeypatch):
    policy, batch = phased
    # GR00T reads patches and a state of its own.
    other = {name: batch[name] * 0.5 for name in ("observation.images.1", "pixel_values") if name in batch}
    other |= {name: batch[name] + 0.5 for name in ("observation.state", "state") if name in batch}
    other = batch | other
    if guided:
        if policy.family.policy_type not in FLOWS:
            pytest.skip("LeRobot guides no chunks of this policy")
        policy.config.rtc_config = RTCConfig(enabled=True, debug=True)
        policy.init_rtc_processor()
    expected = [act(policy, given) for given in (batch, other)]
    make = program.Program.__init__

    def recorded(self, phases, steps, observation, noise, **options):
        make(self, phases, steps, observation, noise, **options)
        self._record(observation, noise)

    monkeypatch.setattr(program, "RecordedFunction", Overwriting)
    monkeypatch.setattr(program.Program, "__init__", recorded)
    policy.use_runtime("fast")
    act(policy, other)
    found = [act(policy, given) for given in (batch, other)]
    assert len(policy.seam.runtime.programs) == 1
    for one, two in zip(expected, found, strict=True):
        assert apart(one, two) < ROUNDING
    assert apart(*expected) > 10 * ROUNDING


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_recorded_function_follows_its_inputs():
    weight = torch.randn(4, 4, device="cuda")
    recorded = graphs.RecordedFunction(lambda fixed, x: (fixed @ x, x + 1), (weight,), (torch.zeros(4, device="cuda"),))
    for _ in range(2):
        x = torch.randn(4, device="cuda")
        product, more = recorded(x)
        torch.testing.assert_close(product, weight @ x)
        torch.testing.assert_close(more, x + 1)
