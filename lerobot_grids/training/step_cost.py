"""What one training step costs, before it runs: FLOPs and memory, on the meta device without weights."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lerobot_policy_grids import GridsPolicy, compress
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.modeling_grids import dense_policy

from ..profiling.architectures import instantiate, make_training_batch
from ..profiling.counting import flop_counter
from ..profiling.gpu_rules import GpuRules
from ..profiling.live_memory import LiveMemory
from ..profiling.meta_values import meta_values
from .distillation import DenseTeacher, Distillation, SelfTeacher, Teacher
from .trainable import Trained, train_only

# Of a GPU's memory; the rest is CUDA's own, and the gaps between tensors.
USABLE_SHARE = 0.9


@dataclass(frozen=True)
class StepCost:
    """Costs of one training step of `batch_size` frames.

    Attributes:
        batch_size: Frames of the step.
        forward_flops: FLOPs of the student's forward pass; a multiply-add counts as 2.
        backward_flops: FLOPs of the backward pass, with what gradient checkpointing computes again.
        teacher_flops: FLOPs of the teacher's forward pass. A vision tower that both share counts here.
        weights: Bytes of all parameters and buffers, with a separate teacher's.
        gradients: Bytes of the gradients.
        optimizer: Bytes of AdamW's two states.
        saved: Bytes that the forward pass saves for the backward pass.
        activations: Bytes of the batch and of everything else that forward and backward pass hold at the same time, at
            their largest: saved tensors, what is computed again, and intermediate results.
        activations_per_frame: How much `activations` grows with each frame.
        scratch: Bytes that AdamW needs while it steps, when the activations are gone.
    """

    batch_size: int
    forward_flops: int
    backward_flops: int
    teacher_flops: int
    weights: int
    gradients: int
    optimizer: int
    saved: int
    activations: int
    activations_per_frame: float
    scratch: int

    @property
    def flops(self) -> int:
        """FLOPs of the whole step."""
        return self.forward_flops + self.backward_flops + self.teacher_flops

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Bytes at the step's peak."""
        return self.fixed + max(self.activations, self.scratch)

    def peak_of(self, batch_size: int) -> int:
        """Bytes at the peak of a step of another size; activations grow evenly with the batch."""
        more = (batch_size - self.batch_size) * self.activations_per_frame
        return self.fixed + max(round(self.activations + more), self.scratch)

    def largest_batch(self, memory: int) -> int:
        """The largest batch that fits a GPU with `memory` bytes; 0 if none does."""
        usable = USABLE_SHARE * memory
        if self.peak_of(1) > usable:
            return 0
        room = usable - self.fixed - self.activations
        return self.batch_size + int(room // self.activations_per_frame)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and totals as plain values."""
        return asdict(self) | {"flops": self.flops, "peak": self.peak}


def predict_step(
    config: Any,
    train: Trained,
    *,
    tokens: int | None = None,
    reducer: Any = None,
    batch_size: int = 8,
    language_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    lora_rank: int = 16,
    distill: bool = False,
) -> StepCost:
    """Count the FLOPs and the bytes of a training step of a policy at its real size; it needs no memory for them.

    Precision is as in `fit`: weights keep their own, and a policy whose own is bfloat16 computes in mixed precision.

    Args:
        config: Configuration of the dense policy.
        train: Weights to train, as in `fit`.
        tokens: Visual tokens per camera; None takes all, without a reducer.
        reducer: Name or configuration of the reducer; None takes "grids".
        batch_size: Frames of the step.
        language_tokens: Instruction tokens after padding; None takes the family's default.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        lora_rank: Rank of the low-rank adaptation.
        distill: Whether a dense teacher predicts, too: the network itself if its weights are frozen, else a copy.

    Raises:
        GridsError: If the policy cannot be trained so.
        NotImplementedError: If the step depends on values of tensors, which the meta device does not have.
    """
    config = deepcopy(config)
    if gradient_checkpointing:
        config.gradient_checkpointing = True
    dense = instantiate(config, "meta")
    policy = dense if tokens is None else compress(dense, tokens, deepcopy(reducer) or "grids")
    train_only(policy, train, lora_rank)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise GridsError("this reducer has no weights to train")
    policy.train()
    teacher: Teacher | None = None
    if distill and isinstance(policy, GridsPolicy):
        teacher = SelfTeacher(policy) if train != "all" else DenseTeacher(instantiate(deepcopy(config), "meta"))
    length = language_tokens or get_family(config.type).language_tokens
    one = _run(policy, teacher, batch_size, length)
    two = _run(policy, teacher, 2 * batch_size, length)
    gradients, optimizer, scratch = _optimizer_bytes(policy)
    return StepCost(
        batch_size,
        one.forward_flops,
        one.backward_flops,
        one.teacher_flops,
        weights=one.weights,
        gradients=gradients,
        optimizer=optimizer,
        saved=one.saved,
        activations=one.activations,
        activations_per_frame=(two.activations - one.activations) / batch_size,
        scratch=scratch,
    )


@dataclass
class _Run:
    """What is seen while a step runs; the names are those of `StepCost`."""

    weights: int = 0
    saved: int = 0
    activations: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    teacher_flops: int = 0


def _run(policy: Any, teacher: Teacher | None, size: int, language_tokens: int) -> _Run:
    """Run the forward and the backward pass of one step."""
    policy.zero_grad()
    weights = [*_state_of(policy), *(_state_of(teacher.policy) if isinstance(teacher, DenseTeacher) else ())]
    base = dense_policy(policy)
    device = str(next(policy.parameters()).device)
    batch = make_training_batch(base, size, language_tokens, device)
    run, memory, counter = _Run(weights=_bytes(weights)), LiveMemory(weights), flop_counter()
    with meta_values(), GpuRules(getattr(base.config, "dtype", "float32") == "bfloat16") as rules, memory, counter:
        memory.add(batch)
        with _saved(run, weights), _counted(run, teacher, counter):
            loss = _loss(policy, teacher, batch)
        rules.end_forward()
        run.forward_flops = counter.get_total_flops() - run.teacher_flops
        # Not `loss.backward()`: the rules would not hold for what it computes again.
        torch.autograd.graph._engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    run.backward_flops = counter.get_total_flops() - run.forward_flops - run.teacher_flops
    run.activations = memory.peak
    return run


def _loss(policy: Any, teacher: Teacher | None, batch: dict[str, Any]) -> Any:
    if teacher is None:
        loss, _ = policy.forward(batch)
        return loss
    loss, distance = Distillation(policy, teacher).losses(batch)
    return loss + distance


def _state_of(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: list[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextmanager
def _saved(run: _Run, weights: list[torch.Tensor]) -> Iterator[None]:
    """Add up the storages that autograd has saved when this block ends, each once, without those of weights."""
    own = {tensor.untyped_storage()._cdata for tensor in weights}
    # Not the storages themselves: some are saved for a part of the graph that is dropped before the block ends.
    found: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = weakref.ref(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    held = [reference() for key, reference in found.items() if key not in own]
    run.saved = sum(storage.nbytes() for storage in held if storage is not None)


@contextmanager
def _counted(run: _Run, teacher: Any, counter: Any) -> Iterator[None]:
    """Count the FLOPs of the teacher apart."""
    if teacher is None:
        yield
        return
    predict: Callable[..., Any] = teacher.predict

    def counted(*args: Any, **kwargs: Any) -> Any:
        before = counter.get_total_flops()
        predicted = predict(*args, **kwargs)
        run.teacher_flops += counter.get_total_flops() - before
        return predicted

    teacher.predict = counted
    try:
        yield
    finally:
        del teacher.predict


def _optimizer_bytes(policy: nn.Module) -> tuple[int, int, int]:
    """Bytes of (gradients, AdamW's states, what its step needs besides) after a backward pass."""
    trained = [parameter for parameter in policy.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    # As on a GPU, where it works on all parameters at once.
    optimizer = torch.optim.AdamW(trained, foreach=True)
    with LiveMemory([*_state_of(policy), *gradients]) as memory:
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.is_meta]
    held = _bytes(states)
    return _bytes(gradients), held, memory.peak - held
