"""What every adapter answers about its VLA family, and how it puts a reducer between vision and trunk."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..anchors import Region
from ..errors import UnsupportedPolicyError


@dataclass(frozen=True)
class TokenLayout:
    """The visual tokens a base policy hands to its trunk.

    Attributes:
        token_grid: (H, W) of one camera's feature map.
        width: C, channels of a visual token.
        cameras: Feature keys of the cameras, in the order in which the policy numbers them.
        language_width: Channels of an embedded language token.
        state_width: Dimensions of the (padded) robot state.
        region: The part of the vision tower's input that holds any camera's image and not only padding.
    """

    token_grid: tuple[int, int]
    width: int
    cameras: tuple[str, ...]
    language_width: int
    state_width: int
    region: Region

    @property
    def num_dense_tokens(self) -> int:
        """N = H * W, visual tokens per camera of the dense policy."""
        return self.token_grid[0] * self.token_grid[1]


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


class Adapter(ABC):
    """One VLA family's seam. Stateless: everything it changes lives on the policy and is undone by `detach`."""

    @abstractmethod
    def layout(self, policy: Any) -> TokenLayout:
        """Describe the dense visual tokens of `policy`.

        Raises:
            UnsupportedPolicyError: If its images do not give a whole grid of tokens.
        """

    @abstractmethod
    def attach(self, policy: Any, get_reducer: Callable[[], nn.Module]) -> None:
        """From now on `policy` passes its dense feature maps through `get_reducer()`.

        Raises:
            UnsupportedPolicyError: If a reducer is attached already.
        """

    @abstractmethod
    def detach(self, policy: Any) -> None:
        """Undo `attach`; the policy is then bit-identical to what it was. Harmless when nothing is attached."""

    @abstractmethod
    def stages(self, policy: Any) -> Stages:
        """The parts of `policy` that are measured one by one."""

    @abstractmethod
    def feature_source(self, policy: Any) -> nn.Module:
        """The submodule whose output is the dense feature map that a reducer reads, [b, n, c]."""

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
