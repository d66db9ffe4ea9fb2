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
from lerobot.processor import NormalizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from lerobot_policy_grids import GridsConfig, GridsPolicy
from lerobot_policy_grids.checkpoint import read_config
from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families import Target, get_family

from ..policies import LoadedPolicy, find_source, load, load_processors
from .lora import without_lora

# What teacher and student must agree on besides their type.
SAME = ("chunk_size", "max_action_dim", "max_state_dim", "output_features")


@dataclass
class Predicted:
    """What a policy predicted in one training step.

    Attributes:
        output: Velocity or actions [b, steps, d], or logits [b, tokens, vocabulary].
        hidden: The trunk's last hidden state [b, t, c].
    """

    output: Tensor
    hidden: Tensor


@contextmanager
def watch(target: Target, noise: dict[str, Tensor] | None = None) -> Iterator[list[Predicted]]:
    """Collect what the policy predicts while the block runs.

    Args:
        target: Where.
        noise: Noise and time of the policy that ran before, which this one gets too; filled if it is empty.
    """
    seen: list[Predicted] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(Predicted(output, inputs[0]))

    def replay(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        assert noise is not None
        assert target.noise is not None
        if not noise:
            noise.update({name: kwargs[name] for name in target.noise[1]})
        return args, kwargs | noise

    handles = [target.module.register_forward_hook(keep)]
    if target.noise is not None and noise is not None:
        handles.append(target.noise[0].register_forward_pre_hook(replay, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
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

    def predict(self, batch: Mapping[str, Any], noise: dict[str, Tensor] | None = None) -> Predicted:
        """Run one training step's forward pass without gradients; `noise` as in `watch`."""
        with torch.no_grad(), self.dense() as policy:
            with watch(get_family(policy.config.type).target(policy), noise) as seen:
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
        # Weight averaging copies the module that it averages, and a teacher is not averaged.
        return self


class SelfTeacher(Teacher):
    """The student itself, with reducer and LoRA switched off: no second copy in memory.

    Args:
        policy: A grids policy whose base is frozen but for LoRA.
    """

    description = "the same network with every token, its reducer and LoRA switched off"
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


class Distillation:
    """Teaches a grids policy what the dense policy predicts. A plain object, as teachers are.

    Args:
        policy: The student.
        teacher: The dense policy that it imitates.
        temperature: Softens the predicted distribution, where the prediction is one.
        feature_weight: Weight of the distance between the trunks' last hidden states.

    Raises:
        GridsError: If a temperature is given and the prediction is no distribution.
    """

    def __init__(
        self, policy: GridsPolicy, teacher: Teacher, temperature: float | None = None, feature_weight: float = 0.0
    ) -> None:
        self.policy = policy
        self.teacher = teacher
        self.temperature = temperature
        self.feature_weight = feature_weight
        self.target = policy.family.target(policy.base)
        if temperature is not None and self.target.softened is None:
            raise GridsError(
                f"distill_temperature={temperature}: a '{policy.base.config.type}' policy predicts actions, which have "
                "no temperature; drop it"
            )

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(task loss of the student, its distance to the teacher), each a scalar."""
        draws = _new_seed()
        noise: dict[str, Tensor] = {}
        with self.policy.seam.share_vision() if self.teacher.shares_vision else nullcontext():
            torch.manual_seed(draws)
            teacher = self.teacher.predict(batch, noise)
            torch.manual_seed(draws)
            with watch(self.target, noise) as seen:
                task_loss, _ = self.policy.forward(copied(batch))
        student = seen[-1]
        if self.temperature is not None and self.target.softened is not None:
            loss = self.target.softened(student.output, teacher.output, batch, self.temperature)
        else:
            loss = self.target.loss(student.output, teacher.output, batch)
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


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of hidden states [b, t, c], in units of the teacher's variance."""
    teacher = teacher.float()
    return (student.float() - teacher).square().mean() / teacher.var().clamp_min(1e-6)


def copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its own state and action tensors: some policies change those in place."""
    return {
        key: value.clone() if isinstance(value, Tensor) and value.ndim < 4 else value for key, value in batch.items()
    }


def choose_teacher(teacher: str | None, source: str, student: LoadedPolicy, train: str) -> Teacher:
    """The teacher that the options name.

    Args:
        teacher: Checkpoint of a dense policy, or None for `source`.
        source: What the student started from.
        student: The student and its processors.
        train: What of the student is trained.

    Raises:
        GridsError: If there is nothing to imitate, or it does not fit the student.
    """
    policy: Any = student.policy
    if not isinstance(policy, GridsPolicy) or policy.num_tokens == 0:
        advice = "drop --reducer blind" if isinstance(policy, GridsPolicy) else "give --tokens a number"
        raise GridsError(f"distillation teaches a policy with few visual tokens; {advice}, or drop --distill")
    name = source if teacher is None else teacher
    folder = find_source(name)
    if folder is None:
        raise GridsError(
            f"'{name}' starts from random weights, which teach nothing; give --teacher a trained dense policy, or "
            "start from one with --policy"
        )
    config = read_config(folder)
    config.device = "cpu"
    require_alike(name, config, load_processors(folder, config)[0], policy.config, student.preprocessor)
    if teacher is None and train != "all":
        return SelfTeacher(policy)
    return DenseTeacher(load(folder, device="cpu").policy)


def require_alike(name: str, teacher: Any, teacher_pre: Any, student: Any, student_pre: Any) -> None:
    """Raise `GridsError` unless a teacher's predictions mean what the student's do.

    Args:
        name: What to call the teacher.
        teacher: Its configuration.
        teacher_pre: Its pre-processor.
        student: The configuration of the student, dense or grids.
        student_pre: Its pre-processor.
    """
    _check_fit(name, teacher, base_config(student))
    _check_statistics(name, teacher_pre, student_pre)


def _check_fit(name: str, teacher: Any, student: Any) -> None:
    if isinstance(teacher, GridsConfig):
        raise GridsError(
            f"{name} is a grids policy, but a teacher sees every token; give --teacher the dense policy it came from"
        )
    if teacher.type != student.type:
        raise GridsError(f"teacher {name} is a '{teacher.type}', the student a '{student.type}'; they must be alike")
    for field in SAME:
        theirs, ours = getattr(teacher, field, None), getattr(student, field, None)
        if theirs != ours:
            raise GridsError(f"teacher {name} has {field}={theirs}, the student {ours}; they must be alike")


def _check_statistics(name: str, teacher: Any, student: Any) -> None:
    """Normalised differently, the same numbers mean other movements."""
    theirs, ours = _statistics(teacher), _statistics(student)
    for feature in (OBS_STATE, ACTION):
        for kind, value in ours.get(feature, {}).items():
            other = theirs.get(feature, {}).get(kind)
            if other is None or other.shape != value.shape or not torch.allclose(value, other, rtol=1e-3, atol=1e-5):
                raise GridsError(
                    f"teacher {name} was not trained on this dataset: its {kind} of '{feature}' "
                    f"{'is missing' if other is None else 'differs'}; train it here first (--tokens dense), or do "
                    "without a teacher"
                )


def _statistics(preprocessor: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Of the features that the pre-processor normalises: {feature: {"mean": ..., "std": ...}}."""
    for step in preprocessor.steps:
        if isinstance(step, NormalizerProcessorStep):
            used = {
                "MEAN_STD": ("mean", "std"),
                "MIN_MAX": ("min", "max"),
                "QUANTILES": ("q01", "q99"),
                "QUANTILE10": ("q10", "q90"),
            }
            return {
                feature: {
                    kind: torch.as_tensor(value).float().cpu()
                    for kind, value in step.stats[feature].items()
                    if kind in used.get(step.norm_map[described.type].value, ())
                }
                for feature, described in step.features.items()
                if feature in step.stats
            }
    return {}
