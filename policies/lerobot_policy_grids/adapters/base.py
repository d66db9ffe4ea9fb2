"""What every adapter answers about its VLA family, and how it puts a reducer between vision and trunk."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..anchors import Region
from ..errors import UnsupportedPolicyError
from .layout import TokenLayout
from .seam import Seam


@dataclass(frozen=True)
class Stages:
    """Where a policy spends its time when it acts once, for measuring it.

    Attributes:
        vision: The vision tower.
        projector: What maps its features to the trunk's width.
        steps_field: Field of the configuration that counts the steps after the prefill (denoising or decoding).
        prefix: Name of the method of `policy.model` that embeds the prefix; its first result is [b, length, c].
        decodes: Whether steps generate tokens, each dearer than the one before; denoising steps all cost the same.
    """

    vision: nn.Module
    projector: nn.Module
    steps_field: str
    prefix: str
    decodes: bool = False


@dataclass(frozen=True)
class Prediction:
    """What a policy is trained to predict, and where a teacher's and a student's can be read.

    Attributes:
        module: Its output is the prediction, its input the trunk's last hidden state.
        kind: "velocity" [b, steps, max_action_dim] of the flow, or "logits" [b, tokens, vocabulary] whose entry i
            predicts action token i + 1.
    """

    module: nn.Module
    kind: Literal["velocity", "logits"]


class Adapter(ABC):
    """One VLA family's seam. Stateless: everything it changes lives on the policy and is undone by `detach`."""

    # Field of the configuration with the (height, width) in pixels that images are brought to.
    resolution_field: str

    @abstractmethod
    def layout(self, policy: Any) -> TokenLayout:
        """Describe the dense visual tokens of `policy`.

        Raises:
            UnsupportedPolicyError: If its images do not give a whole grid of tokens.
        """

    @abstractmethod
    def attach(self, policy: Any, seam: Seam) -> None:
        """From now on the images of `policy` become visual tokens by `seam.tokens`.

        Raises:
            UnsupportedPolicyError: If a reducer is attached already.
        """

    def attach_to_trunk(self, policy: Any, seam: Seam) -> None:
        """From now on the trunk of `policy` goes on with what `seam.prune` keeps, after its first layers.

        Raises:
            UnsupportedPolicyError: If this family's trunk cannot be reached from outside.
        """
        raise UnsupportedPolicyError(
            f"no tokens can be dropped inside the trunk of a '{policy.config.type}' policy; choose a reducer "
            "that works before the trunk, such as grids, uniform, pool, random or merge"
        )

    @abstractmethod
    def keep_positions(self, policy: Any, seam: Seam) -> None:
        """From now on the trunk of `policy` numbers its tokens as if all visual tokens were there."""

    @abstractmethod
    def detach(self, policy: Any) -> None:
        """Undo all of this; the policy is then bit-identical to what it was. Harmless when nothing is attached."""

    @abstractmethod
    def stages(self, policy: Any) -> Stages:
        """The parts of `policy` that are measured one by one."""

    @abstractmethod
    def feature_source(self, policy: Any) -> nn.Module:
        """The submodule whose output is the dense feature map that a reducer reads, [b, n, c]."""

    @abstractmethod
    def prediction(self, policy: Any) -> Prediction:
        """What `policy` predicts in a training step, for distillation."""

    def common_region(self, policy: Any) -> Region:
        """The smallest region that holds the image of every camera, whatever its shape."""
        shapes = [feature.shape[-2:] for feature in policy.config.image_features.values()]
        regions = [self.image_region(policy, height, width) for height, width in shapes]
        lefts, tops, rights, bottoms = zip(*regions, strict=True)
        return min(lefts), min(tops), max(rights), max(bottoms)

    @abstractmethod
    def image_region(self, policy: Any, height: int, width: int) -> Region:
        """Where a camera image of (height, width) lies in the letterboxed square that the vision tower sees.

        Returns:
            (left, top, right, bottom) in [0, 1] of that square.
        """

    def to_bfloat16(self, policy: Any) -> bool:
        """Bring the policy to its family's own bfloat16 form, where it has one, and say whether it did."""
        return False

    def checkpoint_names(self, policy: Any, names: list[str]) -> dict[str, str]:
        """How the names in a dense checkpoint file, perhaps of an older release, map to the policy's parameters.

        Returns:
            {parameter name: name in the file}. Names that upstream drops on purpose are left out.
        """
        return {name: name for name in names}


def centred_region(height: int, width: int, target_height: int, target_width: int) -> Region:
    """`Adapter.image_region` for images that are resized with their aspect ratio kept and padded evenly around."""
    ratio = max(width / target_width, height / target_height)
    left = (target_width - int(width / ratio)) // 2 / target_width
    top = (target_height - int(height / ratio)) // 2 / target_height
    return left, top, left + int(width / ratio) / target_width, top + int(height / ratio) / target_height


def refuse_second_attach(attached: bool) -> None:
    """Raise the one error every adapter gives when a reducer is attached twice."""
    if attached:
        raise UnsupportedPolicyError("this policy already has a reducer attached; detach it first")
