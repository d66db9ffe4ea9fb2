"""Distillation from the dense policy: the student gets K tokens, the teacher all, with the same noise and time.

After Hinton et al. 2015 (temperature) and FitNets (Romero et al. 2015, hidden states). A teacher is not part of the
checkpoint or the optimiser, and distributed strategies do not synchronise it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from lerobot.processor import NormalizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from lerobot_policy_grids import GridsConfig, GridsPolicy
from lerobot_policy_grids.checkpoint import read_config
from lerobot_policy_grids.checkpoint.statistics import USED, settle_constants
from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families import Target, get_family
from lerobot_policy_grids.families.seam import Seam
from lerobot_policy_grids.reducers.anchored import AnchoredSampler
from lerobot_policy_grids.reducers.interpolation import bilinear

from ..policies import LoadedPolicy, find_source, load, load_processors
from .lora import without_lora
from .saliency import distance_to_points, saliency

# Fields that must be equal in teacher and student, besides their type.
SAME = ("chunk_size", "max_action_dim", "max_state_dim", "output_features")


@dataclass
class Predicted:
    """The prediction of a policy in one training step.

    Attributes:
        output: Velocity or actions [b, steps, d], or logits [b, tokens, vocabulary].
        hidden: Last hidden states of the trunk [b, t, c].
        features: The vision tower's final features, one tensor for each of its calls: maps or sampled tokens
            [cameras * b, n, c].
        saliency: float32 [b, cameras, n] of a teacher, if it was asked for.
    """

    output: Tensor
    hidden: Tensor
    features: list[Tensor] = field(default_factory=list)
    saliency: Tensor | None = None


@contextmanager
def watch(
    target: Target, source: nn.Module | None = None, noise: dict[str | int, Tensor] | None = None
) -> Iterator[list[Predicted]]:
    """Collect the predictions of a policy while the block runs.

    Args:
        target: Module that predicts, and module that gets the noise.
        source: Module whose outputs are the final features; without it they are not collected.
        noise: Noise and time to use instead of the policy's own. An empty dict is filled with the policy's own, to be
            used for the next policy.
    """
    seen: list[Predicted] = []
    features: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(Predicted(output, inputs[0], list(features)))

    def replay(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        assert noise is not None
        assert target.noise is not None
        if not noise:
            noise.update({name: args[name] if isinstance(name, int) else kwargs[name] for name in target.noise[1]})
        args = tuple(noise.get(place, value) for place, value in enumerate(args))
        return args, kwargs | {name: value for name, value in noise.items() if isinstance(name, str)}

    handles = [target.module.register_forward_hook(keep)]
    if source is not None:
        handles.append(source.register_forward_hook(lambda module, inputs, output: features.append(output)))
    if target.noise is not None and noise is not None:
        handles.append(target.noise[0].register_forward_pre_hook(replay, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Teacher(ABC):
    """A dense policy that is not trained. It is not an `nn.Module`, so that no module registers its weights."""

    # Description for the user.
    description: str
    # The network that teaches, if it is another one than the student's.
    separate: Any = None
    # Whether the student may use the feature maps that the teacher has computed.
    shares_vision = False

    @abstractmethod
    @contextmanager
    def dense(self) -> Iterator[Any]:
        """Yield the dense policy in evaluation mode, with all visual tokens."""

    def predict(
        self, batch: Mapping[str, Any], noise: dict[str | int, Tensor] | None = None, salient: bool = False
    ) -> Predicted:
        """Run the forward pass of a training step; the prediction has no gradients.

        Args:
            batch: The policy's batch.
            noise: As in `watch`.
            salient: Whether to compute the saliency, which takes a backward pass of the trunk.
        """
        with self.dense() as policy:
            family = get_family(policy.config.type)
            with torch.set_grad_enabled(salient), ExitStack() as stack:
                maps = stack.enter_context(self.maps_as_leaves()) if salient else []
                seen = stack.enter_context(watch(family.target(policy), family.feature_source(policy), noise))
                policy.forward(copied(batch))
            predicted = seen[-1]
            if not salient:
                return predicted
            return replace(
                predicted,
                output=predicted.output.detach(),
                hidden=predicted.hidden.detach(),
                saliency=saliency(predicted.output, maps[-1], len(batch[ACTION]), family.layout(policy).extra_tokens),
            )

    def predict_action_chunk(self, batch: Mapping[str, Any]) -> Tensor:
        """Predict an action chunk [b, chunk_size, action_dim]."""
        with torch.no_grad(), self.dense() as policy:
            chunk: Tensor = policy.predict_action_chunk(copied(batch))
        return chunk

    def maps_as_leaves(self) -> AbstractContextManager[list[Tensor]]:
        """In this block the feature maps of the dense policy get gradients; see `Seam.maps_as_leaves`."""
        raise NotImplementedError(f"{self.description} has no dense maps")

    @abstractmethod
    def to(self, device: str | torch.device) -> None:
        """Move the teacher to a device, if it is separate from the student."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A copy of the module must not contain a copy of the teacher.
        return self


class SelfTeacher(Teacher):
    """The student itself with reducer and LoRA switched off, so no second copy is in memory.

    Args:
        policy: A grids policy whose base is frozen except for LoRA.
    """

    description = "the same network with every token, with reducer and LoRA switched off"
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

    def maps_as_leaves(self) -> AbstractContextManager[list[Tensor]]:
        return self.policy.seam.maps_as_leaves()

    def to(self, device: str | torch.device) -> None:
        pass


class DenseTeacher(Teacher):
    """A separate dense policy.

    Args:
        policy: The dense policy; it will be frozen.
    """

    description = "a dense teacher, a second network in memory"

    def __init__(self, policy: Any) -> None:
        self.policy = self.separate = policy.eval().requires_grad_(False)

    @contextmanager
    def dense(self) -> Iterator[Any]:
        yield self.policy

    @contextmanager
    def maps_as_leaves(self) -> Iterator[list[Tensor]]:
        family = get_family(self.policy.config.type)
        seam = Seam(lambda: None, family.layout(self.policy), partial(family.image_region, self.policy))
        family.attach(self.policy, seam)
        try:
            with seam.maps_as_leaves() as maps:
                yield maps
        finally:
            family.detach(self.policy)

    def to(self, device: str | torch.device) -> None:
        self.policy.to(device)


class Distillation:
    """Compute the distance of a grids policy's predictions to those of its teacher. Not an `nn.Module`, like teachers.

    Args:
        policy: The student.
        teacher: The dense policy that the student imitates.
        temperature: Temperature of the predicted distributions, for policies that predict one.
        feature_weight: Weight of the distance between the last hidden states of the trunks.
        map_weight: Weight of `map_loss`, where tokens are sampled inside the vision tower.
        saliency_weight: Weight of the distance between points and where the teacher looks, see `saliency`.

    Raises:
        GridsError: If a temperature is given and the policy does not predict a distribution, a weight of the maps and
            tokens are sampled after the tower, or a weight of the saliency and the reducer has no points that move.
    """

    def __init__(
        self,
        policy: GridsPolicy,
        teacher: Teacher,
        temperature: float | None = None,
        feature_weight: float = 0.0,
        map_weight: float = 0.0,
        saliency_weight: float = 0.0,
    ) -> None:
        self.policy = policy
        self.teacher = teacher
        self.temperature = temperature
        self.feature_weight = feature_weight
        self.map_weight = map_weight
        self.saliency_weight = saliency_weight
        self.target = policy.family.target(policy.base)
        self.source = policy.family.feature_source(policy.base)
        if temperature is not None and self.target.softened is None:
            raise GridsError(
                f"distill_temperature={temperature}: the '{policy.base.config.type}' policy predicts actions, which "
                "have no temperature; drop it"
            )

        if map_weight > 0 and policy.seam.inside is None:
            raise GridsError(
                f"distill_map={map_weight}: tokens are sampled after the vision tower, so they are its map already; "
                "give --reducer.sample_after_layer, or drop it"
            )
        if saliency_weight > 0:
            self.require_points(f"distill_saliency={saliency_weight}")
        if map_weight > 0 or saliency_weight > 0:
            policy.seam.remember_coordinates()

    def require_points(self, option: str) -> None:
        """Raise `GridsError` unless the policy's reducer has points that move, as this option needs."""
        if not isinstance(self.policy.reducer, AnchoredSampler):
            raise GridsError(
                f"{option}: the '{self.policy.config.reducer.type}' reducer has no points that move; give --reducer "
                "grids, or drop it"
            )

    def predict(self, batch: dict[str, Any], salient: bool) -> tuple[Tensor, Predicted, Predicted]:
        """(Task loss of the student, its prediction, the teacher's from the same noise).

        Args:
            batch: The policy's batch.
            salient: Whether to compute the teacher's saliency.
        """
        draws = _new_seed()
        noise: dict[str | int, Tensor] = {}
        with self.policy.seam.share_vision() if self.teacher.shares_vision else nullcontext():
            torch.manual_seed(draws)
            teacher = self.teacher.predict(batch, noise, salient)
            torch.manual_seed(draws)
            with watch(self.target, self.source, noise) as seen:
                task_loss, _ = self.policy.forward(copied(batch))
        return task_loss, seen[-1], teacher

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute (task loss of the student, distance to the teacher), each a scalar."""
        task_loss, student, teacher = self.predict(batch, salient=self.saliency_weight > 0)
        if self.temperature is not None and self.target.softened is not None:
            loss = self.target.softened(student.output, teacher.output, batch, self.temperature)
        else:
            loss = self.target.loss(student.output, teacher.output, batch)
        if self.feature_weight > 0:
            loss = loss + self.feature_weight * feature_loss(student.hidden, teacher.hidden)
        seam = self.policy.seam
        grid = seam.layout.token_grid
        if self.map_weight > 0:
            loss = loss + self.map_weight * map_loss(student.features, teacher.features, seam.coordinates or [], grid)
        if teacher.saliency is not None:
            loss = loss + self.saliency_weight * distance_to_points(teacher.saliency, seam.moving_coordinates, grid)
        return task_loss, loss

    def chunk_distance(self, batch: dict[str, Any]) -> Tensor:
        """Compute the root mean squared distance of normalised action chunks from the same noise."""
        draws, batch = _new_seed(), self.policy.family.acting(batch)
        torch.manual_seed(draws)
        teacher = self.teacher.predict_action_chunk(batch)
        torch.manual_seed(draws)
        student = self.policy.predict_action_chunk(copied(batch))
        return (student.float() - teacher.float()).square().mean().sqrt()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


def _new_seed() -> int:
    """Draw a seed with which teacher and student draw the same noise and time, on any device."""
    return int(torch.randint(2**62, ()))


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of hidden states [b, t, c], in units of the teacher's variance."""
    teacher = teacher.float()
    return (student.float() - teacher).square().mean() / teacher.var().clamp_min(1e-6)


def map_loss(
    student: list[Tensor], teacher: list[Tensor], coordinates: list[Tensor], token_grid: tuple[int, int]
) -> Tensor:
    """Distance of tokens that went through the last layers alone to the dense map at the same coordinates.

    The coordinates get no gradient from the map: a sampler should look where it helps, not where features are easy.

    Args:
        student: Final features of the sampled tokens, [cameras * b, k, c] for each call of the vision tower.
        teacher: Final features of every token, [cameras * b, H * W, c] for each call; blank cameras may follow.
        coordinates: float32 [b, k, 2] of each camera, without gradient.
        token_grid: (H, W).

    Returns:
        `feature_loss` over the tokens of all cameras.
    """
    size = len(coordinates[0])
    tokens = [part for call in student for part in call.split(size)]
    maps = [part.unflatten(1, token_grid) for call in teacher for part in call.split(size)]
    height, width = token_grid
    read = [
        bilinear(dense, places * places.new_tensor([width, height]) - 0.5)
        for dense, places in zip(maps, coordinates, strict=False)
    ]
    return feature_loss(torch.cat(tokens, dim=1), torch.cat(read, dim=1))


def copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the small tensors of a batch, because some policies change state and actions in place."""
    return {
        key: value.clone() if isinstance(value, Tensor) and value.ndim < 4 else value for key, value in batch.items()
    }


def choose_teacher(teacher: str | None, source: str, student: LoadedPolicy, train: str) -> Teacher:
    """Choose the teacher by the options.

    Args:
        teacher: Checkpoint of a dense policy, or None for `source`.
        source: Policy that the student started from.
        student: The student and its processors.
        train: Which weights of the student are trained.

    Raises:
        GridsError: If there is no trained dense policy, or it does not fit the student.
    """
    policy: Any = student.policy
    if not isinstance(policy, GridsPolicy) or policy.num_tokens == 0:
        advice = "drop --reducer blind" if isinstance(policy, GridsPolicy) else "give --tokens a number"
        raise GridsError(f"a teacher teaches a policy with few visual tokens; {advice}, or train without one")
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
    """Raise `GridsError` unless predictions of teacher and student can be compared.

    Args:
        name: Name of the teacher for messages.
        teacher: Configuration of the teacher.
        teacher_pre: Pre-processor of the teacher.
        student: Configuration of the student, dense or grids.
        student_pre: Pre-processor of the student.
    """
    _check_fit(name, teacher, base_config(student))
    _check_statistics(name, teacher_pre, student_pre)


def _check_fit(name: str, teacher: Any, student: Any) -> None:
    if isinstance(teacher, GridsConfig):
        raise GridsError(f"{name} is a grids policy, but a teacher sees every token; give --teacher its dense policy")
    if teacher.type != student.type:
        raise GridsError(f"teacher {name} has type '{teacher.type}', the student '{student.type}'; they must be equal")
    for option in SAME:
        theirs, ours = getattr(teacher, option, None), getattr(student, option, None)
        if theirs != ours:
            said = [_shown(value) for value in (theirs, ours)]
            raise GridsError(f"teacher {name} has {option} {said[0]}, the student {said[1]}; they must be equal")


def _shown(value: Any) -> str:
    """A field for a message: features by their shapes."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name} of shape {tuple(feature.shape)}" for name, feature in value.items())


def _check_statistics(name: str, teacher: Any, student: Any) -> None:
    """Compare the normalisation: with other statistics, equal numbers mean different movements."""
    theirs, ours = _statistics(teacher), _statistics(student)
    for feature in (OBS_STATE, ACTION):
        for kind, value in ours.get(feature, {}).items():
            other = theirs.get(feature, {}).get(kind)
            if other is None or other.shape != value.shape or not torch.allclose(value, other, rtol=1e-3, atol=1e-5):
                raise GridsError(
                    f"teacher {name} was not trained on this dataset: its {kind} of '{feature}' "
                    f"{'is missing' if other is None else 'differs'}; train it on this dataset first (--tokens "
                    "dense), or train without a teacher"
                )


def _statistics(preprocessor: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Statistics of the features that a pre-processor normalises: {feature: {"mean": ..., "std": ...}}."""
    for step in preprocessor.steps:
        if isinstance(step, NormalizerProcessorStep):
            # Of a teacher from lerobot-train, joints that never moved have LeRobot's rounding.
            settled = settle_constants(step.stats)
            return {
                feature: {
                    kind: torch.as_tensor(value).float().cpu()
                    for kind, value in settled[feature].items()
                    if kind in USED.get(step.norm_map[described.type].value, ())
                }
                for feature, described in step.features.items()
                if feature in settled
            }
    return {}
