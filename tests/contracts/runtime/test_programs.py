"""What is kept for each shape of observation, what is not, and how graphs are recorded."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from driving import act
from fast_path import apart
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.runtime import Phases, fast, program
from lerobot_policy_grids.runtime.precision import precisely


@pytest.fixture
def made(monkeypatch):
    """One entry for each program that is built."""
    found = []

    class Noted(program.Program):
        def __init__(self, *given, **options):
            found.append(given)
            super().__init__(*given, **options)

    monkeypatch.setattr(fast, "Program", Noted)
    return found


def test_nothing_is_built_for_what_is_not_finite(pi0, made):
    policy, batch = pi0
    policy.use_runtime("fast")
    broken = batch | {"observation.state": batch["observation.state"] * float("nan")}
    for _ in range(2):
        with pytest.raises(GridsError):
            act(policy, broken)
    assert (made, policy.seam.runtime.programs) == ([], {})
    act(policy, batch)
    assert len(made) == 1


def test_another_precision_of_the_process_is_another_program(pi0, made):
    policy, batch = pi0
    policy.use_runtime("fast")
    for name, count in (("fp32", 1), ("tf32", 2), ("fp32", 2)):
        with precisely(name):
            act(policy, batch)
        assert len(made) == count
    # Its own precision does not follow that of the process.
    policy.use_runtime("fast", precision="fp32")
    for name in ("fp32", "tf32"):
        with precisely(name):
            act(policy, batch)
        assert len(made) == 3


def test_the_last_programs_are_kept(pi0, made, monkeypatch):
    monkeypatch.setattr(fast, "MOST_PROGRAMS", 2)
    policy, batch = pi0
    policy.use_runtime("fast")
    for tokens, count in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        policy.num_tokens = tokens
        act(policy, batch)
        assert len(made) == count, tokens
    runtime = policy.seam.runtime
    assert len(runtime.programs) == len(runtime.differences) == 2
    policy.base.config.num_inference_steps += 1
    for tokens in (1, 2):
        policy.num_tokens = tokens
        act(policy, batch)
    # Weights for another number of steps went with the last program that used them.
    assert len(runtime._phases) == 1


def test_warming_up_tries_again_what_failed(pi0, monkeypatch, caplog):
    policy, batch = pi0
    policy.use_runtime("fast")
    with monkeypatch.context() as patch:
        patch.setattr(fast, "Program", lambda *given, **options: (_ for _ in ()).throw(MemoryError("full")))
        expected = act(policy, batch)
    assert torch.equal(act(policy, batch), expected)
    assert list(policy.seam.runtime.differences.values()) == ["MemoryError: full"]
    policy.warm_up(batch)
    (found,) = policy.seam.runtime.differences.values()
    assert isinstance(found, float)
    assert caplog.text.count("full") == 1


class Graph:
    """`RecordedFunction` without a GPU; `frozen` ones do not follow these arguments."""

    frozen = 0

    def __init__(self, function, fixed, examples):
        self.places = tree_map(torch.clone, examples)
        self.run = lambda: function(*fixed, *self.places)
        self.result = tree_map(torch.clone, self.run())

    def __call__(self, *arguments):
        for place, value in list(zip(self.places, arguments, strict=True))[self.frozen :]:
            place.copy_(value)
        torch.utils._pytree.tree_map_(lambda place, value: place.copy_(value), self.result, self.run())
        return self.result


@pytest.mark.parametrize("frozen", [0, 1, 9])
def test_a_graph_that_does_not_follow_its_inputs_fails_the_first_check(pi0, frozen, monkeypatch):
    policy, batch = pi0
    expected = act(policy, batch)
    make = program.Program.__init__

    def recorded(self, phases, steps, observation, noise, **options):
        make(self, phases, steps, observation, noise, **options)
        self._record(observation, noise)

    monkeypatch.setattr(program.Program, "__init__", recorded)
    monkeypatch.setattr(program, "RecordedFunction", type("Frozen", (Graph,), {"frozen": frozen}))
    policy.use_runtime("fast")
    act(policy, batch)
    (found,) = policy.seam.runtime.differences.values()
    assert isinstance(found, float if frozen == 0 else str)
    assert apart(expected, act(policy, batch)) < 1e-4


def test_graphs_are_recorded_on_the_device_of_the_policy(monkeypatch):
    on, recorded = [], []

    @contextmanager
    def device(which):
        on.append(which)
        yield
        on.pop()

    class Recorded(torch.nn.Module):
        def __init__(self, function, fixed, examples):
            super().__init__()
            recorded.append((list(on), [example.abs().max() for example in examples]))
            self.result = examples

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(program, "RecordedFunction", Recorded)
    with FakeTensorMode():
        noise = torch.ones(1, 2, 3, device="cuda:1")
        program.Program(Phases(torch.nn.Identity(), torch.nn.Identity()), 2, (noise,), noise, compiled=False)
    assert [where for where, _ in recorded] == [[torch.device("cuda:1")]] * 2
