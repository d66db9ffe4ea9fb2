"""Distillation from the dense policy: the student sees K tokens, the teacher all of them, both the same noise and time.

After Hinton et al. 2015 (temperature) and FitNets (Romero et al. 2015, hidden states). No teacher is part of a
checkpoint, of an optimiser or of what a distributed strategy synchronises.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK
from torch import Tensor, nn

from lerobot_policy_grids.adapters import Prediction, get_adapter
from lerobot_policy_grids.modeling_grids import GridsPolicy

from .lora import without_lora


@dataclass
class Predicted:
    """What a policy predicted in one training step.

    Attributes:
        output: Velocity [b, steps, d] or logits [b, tokens, vocabulary].
        hidden: The trunk's last hidden state [b, t, c].
    """

    output: Tensor
    hidden: Tensor


@contextmanager
def watch(prediction: Prediction) -> Iterator[list[Predicted]]:
    """Collect what the policy predicts while the block runs."""
    seen: list[Predicted] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(Predicted(output, inputs[0]))

    handle = prediction.module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


class Teacher(ABC):
    """A dense policy that is not trained. A plain object, so that no module counts it among its parts."""

    # What it is, for the user.
    description: str
    # Whether the student may take over the feature maps that the teacher has computed.
    shares_vision = False

    @abstractmethod
    @contextmanager
    def dense(self) -> Iterator[Any]:
        """The dense policy, while the block runs: in evaluation mode, with all visual tokens."""

    def predict(self, batch: Mapping[str, Any]) -> Predicted:
        """Run one training step's forward pass without gradients."""
        with torch.no_grad(), self.dense() as policy:
            with watch(get_adapter(policy.config.type).prediction(policy)) as seen:
                policy.forward(copied(batch))
            return seen[-1]

    def predict_action_chunk(self, batch: Mapping[str, Any]) -> Tensor:
        """Action chunk [b, chunk_size, action_dim]."""
        with torch.no_grad(), self.dense() as policy:
            chunk: Tensor = policy.predict_action_chunk(copied(batch))
        return chunk

    @abstractmethod
    def to(self, device: str | torch.device) -> None:
        """Move to a device, unless the student takes it along."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Weight averaging copies the module that it averages; nobody averages a teacher.
        return self


class SelfTeacher(Teacher):
    """The student itself, with reducer and low-rank adapters switched off: no second copy in memory.

    Args:
        policy: A grids policy whose base is frozen but for its low-rank adapters.
    """

    description = "the same network with every token, its reducer and adapters switched off"
    shares_vision = True

    def __init__(self, policy: GridsPolicy) -> None:
        self.policy = policy

    @contextmanager
    def dense(self) -> Iterator[Any]:
        base, training = self.policy.base, self.policy.base.training
        with self.policy.looking_everywhere(), without_lora(base):
            base.eval()
            try:
                yield base
            finally:
                base.train(training)

    def to(self, device: str | torch.device) -> None:
        pass


class DenseTeacher(Teacher):
    """A dense policy of its own.

    Args:
        policy: It is frozen.
    """

    description = "a dense teacher, a second network in memory"

    def __init__(self, policy: Any) -> None:
        self.policy = policy.eval().requires_grad_(False)

    @contextmanager
    def dense(self) -> Iterator[Any]:
        yield self.policy

    def to(self, device: str | torch.device) -> None:
        self.policy.to(device)


@dataclass
class Distillation:
    """Teaches a grids policy what the dense policy predicts.

    Args:
        policy: The student.
        teacher: Whom it imitates.
        temperature: Softens logits; velocities have none.
        feature_weight: Weight of the distance between the trunks' last hidden states.
    """

    policy: GridsPolicy
    teacher: Teacher
    temperature: float = 1.0
    feature_weight: float = 0.0

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(task loss of the student, its distance to the teacher), each a scalar."""
        prediction = self.policy.adapter.prediction(self.policy.base)
        draws = _new_seed()
        with self.policy.seam.share_vision() if self.teacher.shares_vision else nullcontext():
            torch.manual_seed(draws)
            teacher = self.teacher.predict(batch)
            torch.manual_seed(draws)
            with watch(prediction) as seen:
                task_loss, _ = self.policy.forward(copied(batch))
        student = seen[-1]
        if prediction.kind == "velocity":
            loss = velocity_loss(student.output, teacher.output, batch)
        else:
            loss = logit_loss(student.output, teacher.output, batch[ACTION_TOKEN_MASK], self.temperature)
        if self.feature_weight > 0:
            loss = loss + self.feature_weight * feature_loss(student.hidden, teacher.hidden)
        return task_loss, loss

    def chunk_distance(self, batch: dict[str, Any]) -> Tensor:
        """Root mean squared distance of the normalised action chunks, from the same noise."""
        draws = _new_seed()
        torch.manual_seed(draws)
        teacher = self.teacher.predict_action_chunk(batch)
        torch.manual_seed(draws)
        student = self.policy.predict_action_chunk(copied(batch))
        return (student.float() - teacher.float()).square().mean().sqrt()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _new_seed() -> int:
    """With it teacher and student draw the same noise and time, whatever the device."""
    return int(torch.randint(2**62, ()))


def velocity_loss(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean squared distance of the velocities of real action dimensions at steps within the episode.

    Args:
        student: [b, steps, max_action_dim].
        teacher: The same shape.
        batch: Holds the actions [b, steps, action_dim], and perhaps `action_is_pad` [b, steps].
    """
    size = batch[ACTION].shape[-1]
    error = (student[..., :size].float() - teacher[..., :size].float()).square().mean(-1)
    pad = batch.get("action_is_pad")
    inside = torch.ones_like(error) if pad is None else (~pad).to(error.dtype)
    return (error * inside).sum() / inside.sum().clamp_min(1)


def logit_loss(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the teacher's distribution of each next action token to the student's.

    Args:
        student: Logits [b, tokens, vocabulary]; entry i predicts token i + 1.
        teacher: The same shape.
        mask: bool [b, tokens], which tokens are real.
        temperature: Divides the logits; the loss is multiplied by its square, as in Hinton et al.
    """
    mask = mask[:, 1:]
    # Only real tokens: a vocabulary of 257 152 entries is dear.
    ours = (student[:, :-1][mask].float() / temperature).log_softmax(-1)
    theirs = (teacher[:, :-1][mask].float() / temperature).log_softmax(-1)
    divergence = nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    return divergence * temperature**2 / max(1, len(ours))


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of hidden states [b, t, c], in units of the teacher's variance."""
    teacher = teacher.float()
    return (student.float() - teacher).square().mean() / teacher.var().clamp_min(1e-6)


def copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its own state and action tensors: some policies change those in place."""
    return {
        key: value.clone() if isinstance(value, Tensor) and value.ndim < 4 else value for key, value in batch.items()
    }
