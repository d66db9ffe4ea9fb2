"""What a VLA family declares: where its visual tokens are, and everything else this project must know of it.

A family is stateless: what `attach` changes lives on the policy, and `detach` undoes it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeGuard

from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from ..errors import UnsupportedPolicyError
from ..reducers import TokenLayout
from ..reducers.anchors import Region
from ..runtime import FastRuntime, Phases
from .needs import needing_files, needing_packages
from .seam import Seam
from .tower import Tower, sample_between

# Part of the name of a camera that exists only in a configuration.
EMPTY_CAMERA = "empty_camera"
# Channels that an image may have: depth, colour, colour with opacity.
CHANNELS = (1, 3, 4)
# What a policy has a largest width of, and what the field of its configuration may be called.
LIMITS = (
    (OBS_STATE, "state", ("max_state_dim",)),
    (ACTION, "action", ("max_action_dim", "expected_max_action_dim")),
)


class DensePolicy(Protocol):
    """The methods of a LeRobot policy that this project calls. Only its family uses its inner modules."""

    config: Any
    model: Any

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any] | None]:
        """Training loss of a pre-processed batch, and plain numbers to log."""

    def predict_action_chunk(self, batch: dict[str, Any]) -> Tensor:
        """Action chunk [b, chunk_size, action_dim]."""

    def select_action(self, batch: dict[str, Any]) -> Tensor:
        """The next action [b, action_dim]."""

    def reset(self) -> None:
        """Forget queued actions."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter, as of any module."""


@dataclass(frozen=True)
class Recipe:
    """How a family is trained unless told otherwise.

    Attributes:
        steps: Training steps.
        batch: Frames per step, over all devices and accumulated micro-batches.
        micro_batch: Frames per device at once.
        lr: Peak learning rate.
        warmup: Share of the steps in which the learning rate rises linearly.
    """

    steps: int = 20_000
    batch: int = 64
    micro_batch: int = 8
    lr: float = 5e-5
    warmup: float = 0.05


@dataclass(frozen=True)
class Stages:
    """The parts of a policy that are measured one by one.

    Attributes:
        vision: The vision tower.
        projector: What maps its features to the trunk's width.
        steps_field: Field of the configuration that counts the steps after the prefill (denoising or decoding); None
            for a policy that predicts its actions in one pass.
        prefix: Name of the method of `Family.model`, or of a module in it, that returns the prefix.
        decodes: Whether steps generate tokens, each dearer than the one before; denoising steps all cost the same.
    """

    vision: nn.Module
    projector: nn.Module
    steps_field: str | None
    prefix: str
    decodes: bool = False


@dataclass(frozen=True)
class Target:
    """What a policy is trained to predict, for distillation: where it is read, and how to compare two predictions.

    Attributes:
        module: Its output is the prediction, its first input the trunk's last hidden state.
        loss: Distance of (student's output, teacher's output, batch), a scalar.
        softened: The same with a temperature as a fourth argument, where the prediction is a distribution.
        noise: A module, and the arguments, by name or by place, with which it gets noise and time, where the policy
            draws them after other draws of its training mode, or draws none when it acts: the same seed before both
            would not give both the same.
    """

    module: nn.Module
    loss: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
    softened: Callable[[Tensor, Tensor, Mapping[str, Tensor], float], Tensor] | None = None
    noise: tuple[nn.Module, tuple[str | int, ...]] | None = None


class Family(ABC):
    """One LeRobot policy type.

    Args:
        policy_type: LeRobot's name of it.
        sources: What `--policy` may call it, and where its dense policy comes from: a Hub id, a folder in this package,
            or None for random weights.
        recipe: How it is trained.
        image_size: Side in pixels of the square that its default checkpoint sees.
        language_tokens: Instruction tokens after padding.

    Attributes:
        resolution_field: Field of the configuration with the size in pixels that images are brought to; None where they
            stay as they come, or where that follows from the images.
        extra: Extra of this distribution that installs what the policy needs; None if LeRobot alone is enough.
        packages: What of that extra is imported whatever the policy's options are.
        steps: Processor steps that no other family's are, and their options: what is not listed is not loaded from
            the Hub.
        repositories: Field, key inside one, or option -> the repositories of tokenizers and models that it may name,
            or the words that it may hold.
        flow_steps: Field of the configuration with the number of its flow's integration steps; None without a flow.
        reads_state: Whether it cannot do without the robot's state.
        spares_cameras: Whether it goes without a camera that sends no image.
        writes_state: Whether it writes the state into its prompt, so that states of any width fit.
        camera_prefix: How the names of cameras begin whose pixels its processors normalise.
        reference: The convention of published GridS weights in this family (`reducers.reference`); None if there are
            none.
        counted_on_meta: Whether its FLOPs can be counted without values.
        exports: Whether its phases can be exported, if it has any: those that take an `Observation` and integrate a
            flow from noise.
    """

    resolution_field: ClassVar[str | None]
    extra: ClassVar[str | None]
    packages: ClassVar[tuple[str, ...]] = ()
    steps: ClassVar[Mapping[str, frozenset[str]]] = {}
    repositories: ClassVar[Mapping[str, frozenset[str | None]]] = {}
    flow_steps: ClassVar[str | None] = None
    reads_state: ClassVar[bool] = True
    spares_cameras: ClassVar[bool] = True
    writes_state: ClassVar[bool] = False
    camera_prefix: ClassVar[str] = ""
    reference: ClassVar[str | None] = None
    counted_on_meta: ClassVar[bool] = False
    exports: ClassVar[bool] = True

    def __init__(
        self,
        policy_type: str,
        *,
        sources: Mapping[str, str | Path | None],
        recipe: Recipe,
        image_size: int,
        language_tokens: int,
    ) -> None:
        self.policy_type = policy_type
        self.sources = dict(sources)
        self.recipe = recipe
        self.image_size = image_size
        self.language_tokens = language_tokens

    # The seam.

    @abstractmethod
    def layout(self, policy: DensePolicy) -> TokenLayout:
        """Describe the dense visual tokens of `policy`.

        Raises:
            UnsupportedPolicyError: If its images do not give a whole grid of tokens.
        """

    def projected(self, policy: DensePolicy, layout: TokenLayout) -> TokenLayout:
        """`layout`, for a reducer that reads the map behind the projector; overridden where others read before it."""
        return layout

    @abstractmethod
    def attach(self, policy: DensePolicy, seam: Seam) -> None:
        """From now on the images of `policy` become visual tokens by `seam.tokens`.

        Raises:
            UnsupportedPolicyError: If a reducer is attached already.
        """

    @abstractmethod
    def detach(self, policy: DensePolicy) -> None:
        """Undo everything; the policy is then bit-identical to what it was. Harmless when nothing is attached."""

    @abstractmethod
    def feature_source(self, policy: DensePolicy) -> nn.Module:
        """The submodule whose output is the dense feature map that a reducer reads, [b, n, c] or [b * n, c].

        In the latter, the tokens of an image may have another order.
        """

    def change_features(self, policy: DensePolicy, features: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """What `feature_source` returns, with its tokens [b, n, c] changed; overridden where they have other axes."""
        count = self.layout(policy).num_dense_tokens
        return change(features if features.ndim > 2 else features.unflatten(0, (-1, count))).reshape(features.shape)

    @abstractmethod
    def image_region(self, policy: DensePolicy, height: int, width: int) -> Region:
        """Where a camera image of (height, width) lies in the letterboxed square that the vision tower sees.

        Returns:
            (left, top, right, bottom) in [0, 1] of that square.
        """

    def seen_region(self, policy: DensePolicy, height: int, width: int) -> Region:
        """`image_region` with what is cut away of the image, which lies outside [0, 1]."""
        return self.image_region(policy, height, width)

    def model(self, policy: DensePolicy) -> Any:
        """The module of `policy` that does its work."""
        return policy.model

    def cameras(self, policy: DensePolicy) -> dict[str, Region]:
        """The cameras that may send images, and where the image of each lies in what the vision tower sees."""
        # LeRobot adds `empty_cameras` to a policy that was trained with more cameras; they never send an image.
        shapes = {k: f.shape for k, f in policy.config.image_features.items() if EMPTY_CAMERA not in k}
        return {key: self.image_region(policy, *image_size(shape)) for key, shape in shapes.items()}

    def require_inputs(self, inputs: Mapping[str, Any] | None) -> None:
        """Refuse input features that the policy could not read, or would read as something else.

        Args:
            inputs: LeRobot's input features.

        Raises:
            UnsupportedPolicyError: If there is no camera, one has no colours, or the state is missing where it is read.
        """
        inputs = inputs or {}
        cameras = {name: tuple(f.shape) for name, f in inputs.items() if f.type is FeatureType.VISUAL}
        if not cameras:
            raise UnsupportedPolicyError(
                f"the '{self.policy_type}' policy has no camera in its input_features, and a reducer needs images; "
                "train it on a dataset that has a camera"
            )
        for name, shape in cameras.items():
            if len(shape) != 3 or min(shape) < 1 or 3 not in (shape[0], shape[-1]):
                raise UnsupportedPolicyError(
                    f"camera '{name}' has shape {shape}, expected (3, height, width); correct input_features, or leave "
                    "that camera out"
                )
        if self.reads_state and OBS_STATE not in inputs:
            raise UnsupportedPolicyError(
                f"the '{self.policy_type}' policy reads '{OBS_STATE}', which is not in its input_features; train it on "
                "a dataset that has the robot's state"
            )

    # Optional abilities.

    def keep_positions(self, policy: DensePolicy, seam: Seam) -> None:
        """From now on the trunk of `policy` numbers its tokens as if all visual tokens were there.

        Raises:
            UnsupportedPolicyError: If this family's trunk cannot be told so.
        """
        raise UnsupportedPolicyError(
            f"the trunk of the '{self.policy_type}' policy cannot be given dense position ids; set position_ids to "
            "consecutive"
        )

    def tower(self, policy: DensePolicy) -> Tower:
        """The layers of the vision tower of `policy`, between which tokens can be sampled.

        Raises:
            UnsupportedPolicyError: If this family's tower cannot go on with some of its tokens.
        """
        raise UnsupportedPolicyError(
            f"no tokens can be sampled inside the vision tower of the '{self.policy_type}' policy; drop "
            "sample_after_layer"
        )

    def attach_to_tower(self, policy: DensePolicy, seam: Seam, after: int) -> None:
        """From now on the vision tower of `policy` goes on, after some layers, with the tokens sampled there."""
        sample_between(self.tower(policy).encoder, seam, after)

    def attach_to_trunk(self, policy: DensePolicy, seam: Seam) -> None:
        """From now on the trunk of `policy` goes on with what `seam.prune` keeps, after its first layers.

        Raises:
            UnsupportedPolicyError: If this family's trunk cannot be reached from outside.
        """
        raise UnsupportedPolicyError(
            f"no tokens can be dropped inside the trunk of the '{self.policy_type}' policy; choose a reducer "
            "that works before the trunk, such as grids, uniform, pool, random or tome"
        )

    def require_trunk_training(self) -> None:  # noqa: B027 (most families need nothing)
        """Refuse to train with tokens dropped inside the trunk, where a policy can only act so.

        Raises:
            UnsupportedPolicyError: If LeRobot trains the trunk in a way that `attach_to_trunk` does not reach.
        """

    def act_through(self, policy: DensePolicy, seam: Seam, runtime: FastRuntime) -> None:
        """From now on `policy` acts through a runtime, whose phases are those of `phases`.

        Raises:
            UnsupportedPolicyError: If this family has none, or the policy is made in a way that keeps it from that.
        """
        raise UnsupportedPolicyError(
            f"runtime={runtime.name} is not available for the '{self.policy_type}' policy, whose family declares no "
            "phases; use runtime=eager"
        )

    def phases(self, policy: DensePolicy, seam: Seam, cameras: list[int], steps: int) -> Phases:
        """The two phases of `policy` for these cameras, by number, and denoising steps, with the reducer as it is now.

        Raises:
            UnavailableError: If they could not stand for the policy as it is.
        """
        raise NotImplementedError

    def to_bfloat16(self, policy: DensePolicy) -> bool:
        """Bring the policy to its family's own bfloat16 form, where it has one, and say whether it did."""
        return False

    def checkpoint_names(self, policy: DensePolicy, names: list[str]) -> dict[str, str]:
        """How the names in a dense checkpoint file, perhaps of an older release, map to the policy's parameters.

        Returns:
            {parameter name: name in the file}. Names that upstream drops on purpose are left out.
        """
        return {name: name for name in names}

    def checkpoint_value(self, source: str, value: Tensor) -> Tensor:
        """A value of a dense checkpoint file, stored under the name `source`, as the policy has it."""
        return value

    # Learning and measuring.

    @abstractmethod
    def target(self, policy: DensePolicy) -> Target:
        """What `policy` predicts in a training step, for distillation."""

    def flow(self, policy: DensePolicy) -> nn.Module:
        """The module of `policy` that draws its flow's noise and time, and integrates it.

        Its methods are `sample_noise(shape, device)`, `sample_time(batch_size, device)` and `sample_actions`. At time t
        the flow is at t * noise + (1 - t) * actions, and what `target` predicts is noise - actions.

        Raises:
            UnsupportedPolicyError: If it has no such flow.
        """
        raise UnsupportedPolicyError(
            f"the '{self.policy_type}' policy has no flow whose time is drawn by a method; drop time_bias and one_step"
        )

    @abstractmethod
    def stages(self, policy: DensePolicy) -> Stages:
        """The parts of `policy` that are measured one by one."""

    def prefix_length(self, prefix: Any) -> int:
        """Tokens in what `Stages.prefix` returns."""
        length: int = prefix[0].shape[1]
        return length

    def count_steps(self, policy: DensePolicy) -> int | None:
        """Integration steps of the flow of `policy`; None without a flow."""
        return None if self.flow_steps is None else int(getattr(policy.config, self.flow_steps))

    def set_steps(self, policy: DensePolicy, steps: int) -> None:
        """Let `policy` take so many steps after the prefill from now on."""
        setattr(policy.config, str(self.stages(policy).steps_field), steps)

    def complete(self, policy: DensePolicy, batch: dict[str, Any]) -> dict[str, Any]:
        """A made-up batch with what the pre-processor of this family adds beside or instead of instruction tokens.

        Args:
            policy: The policy that it is for.
            batch: Images, state, instruction tokens and, for training, actions.
        """
        return batch

    def acting(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch that was prepared for training as the policy acts on it."""
        return batch

    # Building it.

    def build(self, config: Any, *, fresh: bool = False, **kwargs: Any) -> Any:
        """A new policy of this family.

        Args:
            config: Its configuration.
            fresh: Whether no weights are loaded into it afterwards: some of LeRobot's classes then fetch those that
                they begin with. Otherwise nothing is downloaded that can be done without.
            **kwargs: What LeRobot's constructor takes besides.

        Raises:
            UnsupportedPolicyError: If the packages that it needs are not installed.
            CheckpointError: If what it begins with cannot be read or downloaded.
        """
        from lerobot.policies.factory import get_policy_class

        if not fresh:
            self.without_download(config)
        with (
            self.needing_its_extra(),
            self.needing_its_files(config, fresh=fresh),
            nullcontext() if fresh else self.without_weights(config),
        ):
            policy: Any = get_policy_class(config.type)(config, **kwargs)
        return policy

    def needing_its_extra(self) -> AbstractContextManager[None]:
        """Around what imports the packages that a policy needs: `needs.needing_packages`."""
        return needing_packages(self.policy_type, self.extra, self.packages)

    def needing_its_files(self, config: Any, *, fresh: bool) -> AbstractContextManager[None]:
        """Around what fetches files that a policy begins with: `needs.needing_files`.

        Args:
            config: Its configuration, or the class of it.
            fresh: Whether no checkpoint has the options of the policy.
        """
        values = {name: getattr(config, name, None) for name in self.repositories}
        options = {name: value for name, value in values.items() if _is_place(value)}
        others = sorted(place for places in self.repositories.values() for place in places if _is_place(place))
        return needing_files(self.policy_type, options, [] if options else others, fresh=fresh)

    def without_download(self, config: Any) -> None:
        """Set a configuration so that building a policy of it downloads nothing that a checkpoint brings anyway."""
        if hasattr(config, "load_vlm_weights"):
            config.load_vlm_weights = False

    def config(self, inputs: dict[str, Any], outputs: dict[str, Any], size: int, dtype: str) -> PreTrainedConfig:
        """The configuration of the default checkpoint's architecture for these features.

        Args:
            inputs: LeRobot's input features.
            outputs: LeRobot's output features.
            size: Side in pixels of the square images.
            dtype: "bfloat16" or "float32", for families that have the choice.
        """
        options: dict[str, Any] = {"input_features": inputs}
        if self.resolution_field is not None:
            options[self.resolution_field] = (size, size)
        return PreTrainedConfig.get_choice_class(self.policy_type)(device="cpu", output_features=outputs, **options)

    def set_resolution(self, config: Any, size: int) -> None:
        """Let a policy of `config` see images of `size` x `size` pixels.

        Raises:
            UnsupportedPolicyError: If the size of its images is no option.
        """
        if self.resolution_field is None:
            raise UnsupportedPolicyError(
                f"--resolution {size}: the size of the images of the '{self.policy_type}' policy is that of the "
                "cameras or follows from it; drop it, or record smaller images"
            )
        setattr(config, self.resolution_field, (size, size))

    def without_weights(self, config: Any) -> AbstractContextManager[None]:
        """In this block a policy of `config` is constructed without fetching weights, because others are loaded."""
        return nullcontext()

    def offline(self, config: Any) -> AbstractContextManager[None]:
        """In this block a policy of `config` is constructed without asking the Hub for sizes or tokenizers."""
        return nullcontext()

    def finish(self, policy: DensePolicy) -> None:  # noqa: B027 (most families need nothing)
        """After constructing a real-size policy without weights: undo what would not run so."""

    @abstractmethod
    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> DensePolicy:
        """LeRobot's own class at some hundred thousand parameters with random weights, offline.

        Args:
            inputs: LeRobot's input features.
            outputs: LeRobot's output features.
            folder: For files that the policy wants to read, such as a tokenizer's.
            **options: Further fields of the configuration.
        """

    def narrow(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> DensePolicy:
        """`small` with all layers and steps of the real architecture: few channels, but as many operations.

        Raises:
            UnsupportedPolicyError: If there is no such instance.
        """
        raise UnsupportedPolicyError(
            f"a narrow policy was asked for, and the '{self.policy_type}' family has none (all layers, few channels); "
            "measure it at its real sizes, without --narrow"
        )


def image_size(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width of an image feature of shape (c, h, w), or (h, w, c) as LeRobot leaves some datasets' shapes."""
    channels_last = shape[0] not in CHANNELS and shape[-1] in CHANNELS
    height, width = shape[:2] if channels_last else shape[-2:]
    return height, width


def _is_place(value: Any) -> TypeGuard[str]:
    """Whether the value of an option is a repository or a folder, and not a word that it may hold."""
    return isinstance(value, str) and "/" in value


def dimension_names(feature: dict[str, Any]) -> list[str] | None:
    """Names of a vector's dimensions; None where the dataset has none. Older datasets group them: {"motors": [...]}."""
    names = feature.get("names")
    if isinstance(names, dict):
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    return [str(name) for name in names] if names else None


def width_faults(source: str, config: Any, widths: Mapping[str, int]) -> list[str]:
    """Lines for states and actions that are wider than a policy takes; some of LeRobot's classes would cut them.

    Args:
        source: What the user calls the policy.
        config: Its configuration.
        widths: Name -> dimensions in the dataset.
    """
    return [
        f"the dataset's {kind} has {widths[name]} dimensions, and {source} takes at most {limit} ({field}); choose "
        "another policy, or a dataset with fewer"
        for name, kind, fields in LIMITS
        for field in fields
        if (limit := getattr(config, field, None)) is not None and widths.get(name, 0) > limit
    ]


def centred_region(height: int, width: int, target_height: int, target_width: int) -> Region:
    """`Family.image_region` for images that are resized with their aspect ratio kept and padded evenly around."""
    ratio = max(width / target_width, height / target_height)
    left = (target_width - int(width / ratio)) // 2 / target_width
    top = (target_height - int(height / ratio)) // 2 / target_height
    return left, top, left + int(width / ratio) / target_width, top + int(height / ratio) / target_height


def lower_right_region(height: int, width: int, target_height: int, target_width: int) -> Region:
    """`Family.image_region` for images that are resized with their aspect ratio kept and padded left and on top."""
    ratio = max(width / target_width, height / target_height)
    return 1 - int(width / ratio) / target_width, 1 - int(height / ratio) / target_height, 1.0, 1.0


def refuse_second_attach(attached: bool) -> None:
    """Raise the one error every family gives when a reducer is attached twice."""
    if attached:
        raise UnsupportedPolicyError("this policy already has a reducer attached; detach it first")


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """In this block attributes of a module or an object are others."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
