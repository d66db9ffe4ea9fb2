"""On a GPU: CUDA graphs act as the eager path does, and a step in mixed precision trains the sampler."""

import copy

import pytest
import torch

from driving import act, train_offsets, wrap
from fast_path import FLOWS, PHASED, apart, small
from lerobot_policy_grids.runtime import fast
from lerobot_policy_grids.runtime.graphs import RecordedFunction

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Products of float32 are exact here, but kernels add in another order than those of a CPU.
ROUNDING = 1e-4
# What the names of weights have in common that nobody reads to act.
UNUSED = {"pi0": "lm_head", "pi05": "lm_head", "tiny_smolvla": "lm_head", "act": "vae_encoder"}


def on_gpu(batch):
    """A batch with its tensors on the GPU."""
    return {name: value.to("cuda") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def of_other_images(batch):
    """The same, of frames that see what the next one of the batch sees."""
    return {
        name: value.roll(1, 0) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


@pytest.fixture(params=PHASED)
def acting(request, family_row):
    """A small policy on the GPU, and two batches."""
    policy, batch = small(family_row(request.param))
    batch = on_gpu(batch)
    return policy.to("cuda"), batch, of_other_images(batch)


def test_graphs_act_as_the_eager_path(acting):
    policy, *batches = acting
    policy.use_runtime("eager")
    expected = [act(policy, batch) for batch in batches]
    policy.use_runtime("fast")
    act(policy, batches[0])
    (program,) = policy.seam.runtime.programs.values()
    assert program is not None, policy.seam.runtime.differences
    assert isinstance(program.prefill, RecordedFunction)
    for _ in range(2):
        for batch, chunk in zip(batches, expected, strict=True):
            assert apart(chunk, act(policy, batch)) < ROUNDING
    assert apart(*expected) > 10 * ROUNDING


def test_graphs_are_the_default(acting):
    policy, batch, _ = acting
    act(policy, batch)
    (program,) = policy.seam.runtime.programs.values()
    assert isinstance(program.prefill, RecordedFunction)
    policy.to("cpu")
    assert not policy.acts_fast()
    assert not any(weight.is_cuda for weight in policy.parameters())


def test_a_chunk_is_not_overwritten_by_the_next(acting):
    policy, first, second = acting
    policy.use_runtime("fast")
    policy.warm_up(first)
    assert all(program is not None for program in policy.seam.runtime.programs.values())
    chunk = act(policy, first)
    kept = chunk.clone()
    act(policy, second)
    assert torch.equal(chunk, kept)


def test_graphs_are_dropped_with_the_weights_they_read(acting):
    policy, batch, _ = acting
    policy.use_runtime("fast")
    before = [act(policy, batch) for _ in range(2)][1]
    assert all(program is not None for program in policy.seam.runtime.programs.values())
    policy.train()
    with torch.no_grad():
        for weight in policy.reducer.parameters():
            weight.mul_(-3)
    policy.eval()
    after = [act(policy, batch) for _ in range(2)][1]
    policy.use_runtime("eager")
    assert apart(act(policy, batch), after) < ROUNDING
    assert apart(before, after) > 10 * ROUNDING


def test_weights_that_nothing_reads_leave_the_gpu_and_nothing_else_does(acting):
    policy, batch, _ = acting
    policy.use_runtime("fast")
    policy.warm_up(batch)
    (program,) = policy.seam.runtime.programs.values()
    prefill, seen = program.prefill, []

    def spy(*observation):
        seen.extend(observation)
        return prefill(*observation)

    program.prefill = spy
    act(policy, batch)
    assert seen
    assert all(value.is_cuda for value in seen)
    away = [name for name, weight in policy.named_parameters() if not weight.is_cuda]
    part = UNUSED.get(policy.family.policy_type)
    assert bool(away) == (part is not None)
    assert all(part in name for name in away)
    policy.train()
    assert all(weight.is_cuda for weight in policy.parameters())


@pytest.mark.parametrize("name", FLOWS)
def test_bfloat16_towers_and_other_budgets_are_recorded_too(family_row, name):
    policy, batch = small(family_row(name))
    policy, batch = policy.to("cuda"), on_gpu(batch)
    policy.use_runtime("fast", precision="bf16")
    for tokens in (5, 3):
        policy.num_tokens = tokens
        found = [act(policy, batch) for _ in range(2)][1]
        with policy.acting_eagerly():
            assert apart(act(policy, batch), found) < fast.BF16_BOUND
    programs = list(policy.seam.runtime.programs.values())
    assert len(programs) == 2
    assert all(program is not None and isinstance(program.prefill, RecordedFunction) for program in programs)


def test_a_step_in_mixed_precision_trains_the_sampler(family):
    policy = train_offsets(wrap(family.policy(), 9)).to("cuda").train()
    batch = on_gpu(family.batch(policy.base))
    with torch.autocast("cuda", torch.bfloat16):
        loss, _ = policy.forward(copy.copy(batch))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in policy.reducer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
