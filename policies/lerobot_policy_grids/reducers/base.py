"""Base classes of reducers: modules that give the trunk fewer visual tokens, and their configurations.

Axes used in shapes: b batch, h and w rows and columns of the token grid, n = h * w, c channels, k tokens that
remain. Coordinates are (x, y) in [0, 1] of the image that the vision tower saw; the centre of column i is at
x = (i + 0.5) / w. Reducers depend on torch and not on LeRobot.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import draccus
import torch
from torch import Tensor, nn

from ..errors import BudgetError, TokenGridError
from .anchors import WHOLE, Region
from .layout import TokenLayout


@dataclass
class ReducerConfig(draccus.ChoiceRegistry):
    """Configuration of a reducer. Each subclass registers the name by which users choose it.

    Attributes:
        summary: Description of the k tokens for a model card: "K visual tokens per camera, <summary>".
        in_trunk: Whether the reducer drops tokens between layers of the trunk instead of before it.
        dense_at_all_tokens: Whether the tokens are the dense ones at K = H * W before training.
        projected: Whether it reads the map behind the projector, in families that can give that (`Family.projected`).
    """

    summary: ClassVar[str] = ""
    in_trunk: ClassVar[bool] = False
    dense_at_all_tokens: ClassVar[bool] = True
    projected: ClassVar[bool] = False

    @classmethod
    def default_choice_name(cls) -> str:
        return "grids"

    @property
    def type(self) -> str:
        """The name of this reducer."""
        return self.get_choice_name(type(self))

    @property
    def budget(self) -> int:
        """K, visual tokens per camera at inference."""
        return 0

    @property
    def largest(self) -> int:
        """Largest K that can be set at run time."""
        return 0

    @property
    def inside(self) -> int | None:
        """Layers of the vision tower that see every patch, if tokens are sampled inside the tower."""
        return None

    def build(self, layout: TokenLayout) -> "Reducer":
        """Build the reducer for a policy with these visual tokens.

        Raises:
            BudgetError: If the budget does not fit the token grid.
        """
        raise NotImplementedError


@dataclass
class BudgetConfig(ReducerConfig):
    """Base of the configurations of reducers that keep some tokens."""

    num_tokens: int = field(default=16, metadata={"help": "K: visual tokens per camera."})
    num_tokens_max: int | None = field(
        default=None,
        metadata={"help": "Largest K this checkpoint can serve at run time. Defaults to num_tokens at training."},
    )

    def __post_init__(self) -> None:
        if not 1 <= self.num_tokens <= self.largest:
            raise BudgetError(
                f"num_tokens={self.num_tokens} with num_tokens_max={self.largest}; "
                f"choose num_tokens from 1 .. {self.largest}"
            )

    @property
    def budget(self) -> int:
        return self.num_tokens

    @property
    def largest(self) -> int:
        return self.num_tokens if self.num_tokens_max is None else self.num_tokens_max

    def arguments(self, layout: TokenLayout) -> dict[str, Any]:
        """The reducer's arguments that follow from the budget and the cameras.

        Raises:
            BudgetError: If the policy has fewer tokens than the budget, or a named camera does not exist.
        """
        if self.largest > layout.num_dense_tokens:
            height, width = layout.token_grid
            raise BudgetError(
                f"{self.largest} tokens per camera requested, but the dense policy has {height} x {width} = "
                f"{layout.num_dense_tokens}; choose 1 .. {layout.num_dense_tokens}, or 'dense' to train the policy "
                "with all its tokens"
            )
        return {"num_tokens": self.num_tokens, "num_tokens_max": self.largest}


@dataclass
class CameraBudgetConfig(BudgetConfig):
    """Base of the configurations of reducers that process each camera on its own."""

    camera_tokens: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Largest number of tokens of some cameras, by name."}
    )

    def arguments(self, layout: TokenLayout) -> dict[str, Any]:
        for name, limit in self.camera_tokens.items():
            if name not in layout.cameras:
                raise BudgetError(f"camera_tokens names '{name}'; the policy's cameras are {', '.join(layout.cameras)}")
            if limit < 1:
                raise BudgetError(f"camera_tokens gives {limit} tokens to '{name}'; give at least 1")
        limits = {i: self.camera_tokens[name] for i, name in enumerate(layout.cameras) if name in self.camera_tokens}
        return {**super().arguments(layout), "camera_limits": limits, "regions": layout.regions}


class Sampled(NamedTuple):
    """The tokens that a reducer returns for the trunk.

    Attributes:
        tokens: [b, k, c], in raster order; [b, k * s * s, c] where tokens are blocks of s x s patches (`blocks`).
        coordinates: float32 [b, k, 2], (x, y) in [0, 1] of each token.
    """

    tokens: Tensor
    coordinates: Tensor


def in_float32(tensor: Tensor) -> AbstractContextManager[None]:
    """Disable autocast in this block, so that its rounding does not change which tokens are kept."""
    # `bench` counts FLOPs on the meta device, which has no autocast.
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class Reducer(nn.Module):
    """Replace the h * w visual tokens of an image by k. Base of `MapReducer`, `TrunkReducer` and `BlindReducer`.

    Args:
        token_grid: (H, W) of the feature maps.
        num_tokens: K, the initial budget.
        num_tokens_max: Largest budget that can be set. Defaults to `num_tokens`.

    Raises:
        BudgetError: If a budget is not within 1 .. H * W.

    Attributes:
        condition_on: Names of the inputs that a `MapReducer` uses besides the feature map.
        in_trunk: Whether this is a `TrunkReducer`.
    """

    condition_on: tuple[str, ...] = ()
    in_trunk: bool = False

    def __init__(self, token_grid: tuple[int, int], num_tokens: int, *, num_tokens_max: int | None = None) -> None:
        super().__init__()
        height, width = token_grid
        self.token_grid = (height, width)
        self.num_tokens_max = num_tokens if num_tokens_max is None else num_tokens_max
        if not 1 <= self.num_tokens_max <= height * width:
            raise BudgetError(
                f"num_tokens={self.num_tokens_max} per camera, but the policy's token grid is {height} x {width} "
                f"= {height * width}; choose 1 .. {height * width}"
            )
        # Training steps done with a token schedule; saved, so that a resumed run continues the schedule.
        self.schedule_step: Tensor
        self.register_buffer("schedule_step", torch.zeros((), dtype=torch.int64))
        self._num_tokens: int
        self.num_tokens = num_tokens

    @property
    def num_tokens(self) -> int:
        """K, tokens per camera. May be set to any 1 .. num_tokens_max between calls."""
        return self._num_tokens

    @num_tokens.setter
    def num_tokens(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise BudgetError(f"num_tokens={value!r} is not a whole number; give one from 1 .. {self.num_tokens_max}")
        if self.num_tokens_max == 0:
            raise BudgetError(f"num_tokens={value}, but this policy is blind: it was trained without visual tokens")
        if not 1 <= value <= self.num_tokens_max:
            raise BudgetError(
                f"num_tokens={value}, but this policy supports 1 .. {self.num_tokens_max} tokens per camera; "
                "choose a budget in that range, or train with a larger num_tokens_max"
            )
        self.check_budget(int(value))
        self._num_tokens = int(value)

    def check_budget(self, num_tokens: int) -> None:
        """Raise `BudgetError` if this reducer does not support a budget in 1 .. num_tokens_max; most support all."""

    def reads(self, k: int, camera: int = 0) -> tuple[float, float] | None:
        """How far each of k tokens of a camera reads to the side, and up and down, in cells of the token grid.

        Cells whose centre is that far from the token's coordinate, or farther, do not enter it. None where tokens
        differ in it.
        """
        return None

    def extra_repr(self) -> str:
        """Describe the reducer in the printed policy."""
        height, width = self.token_grid
        text = f"{height}x{width} grid -> {self.num_tokens} tokens (max {self.num_tokens_max})"
        return f"{text}, condition_on={list(self.condition_on)}" if self.condition_on else text


class MapReducer(Reducer):
    """A reducer between vision tower and trunk, which reads a feature map.

    Args:
        token_grid: (H, W) of the feature maps.
        num_tokens: K, the initial budget.
        num_tokens_max: Largest budget that can be set. Defaults to `num_tokens`.
        camera_limits: Largest number of tokens of some cameras, by camera number, whatever the budget.
        regions: Where the image of each camera lies in the vision tower's input; the rest is letterbox padding. One
            region is every camera's.
        block: Patches along a side of a cell in the feature maps.
    """

    def __init__(
        self,
        token_grid: tuple[int, int],
        num_tokens: int,
        *,
        num_tokens_max: int | None = None,
        camera_limits: Mapping[int, int] | None = None,
        regions: Sequence[Region] = (WHOLE,),
        block: int = 1,
    ) -> None:
        self.block = block
        # Set first, because some reducers check a budget against them.
        self.regions = tuple(regions)
        self.camera_limits = dict(camera_limits or {})
        super().__init__(token_grid, num_tokens, num_tokens_max=num_tokens_max)

    def tokens_of(self, camera: int) -> int:
        """Number of tokens of a camera with the current budget."""
        return min(self.num_tokens, self.camera_limits.get(camera, self.num_tokens))

    def region_of(self, camera: int) -> Region:
        """Where the image of a camera lies in the vision tower's input."""
        return self.regions[camera if len(self.regions) > 1 else 0]

    def forward(
        self,
        feature_map: Tensor,
        context: Mapping[str, Tensor] | None = None,
        num_tokens: int | None = None,
        camera: int = 0,
    ) -> Sampled:
        """Reduce each feature map to k tokens.

        Args:
            feature_map: [b, h, w, c], the dense visual tokens of an image as a map, or the patches that become them,
                [b, h * block, w * block, c].
            context: The inputs in `condition_on`: "language" [b, l], "state" [b, s], "camera" int64 [b], the index of
                the camera.
            num_tokens: k for this call. Defaults to the budget.
            camera: Number of the camera whose region the images have.

        Returns:
            `Sampled(tokens [b, k, c], coordinates float32 [b, k, 2])`.

        Raises:
            TokenGridError: If the map's grid is not `token_grid`.
            BudgetError: If the reducer cannot serve k.
        """
        expected = tuple(self.block * size for size in self.token_grid)
        if tuple(feature_map.shape[1:3]) != expected:
            raise TokenGridError(
                f"feature map of {tuple(feature_map.shape[1:3])} tokens, but this reducer was built for "
                f"{expected}; use the image size the checkpoint was trained with"
            )
        return self.reduce(feature_map, context or {}, num_tokens or self.num_tokens, self.region_of(camera))

    def reduce(self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region) -> Sampled:
        """`forward` on a map of the right grid, whose image lies in `region`."""
        raise NotImplementedError


@ReducerConfig.register_subclass("blind")
@dataclass
class BlindConfig(ReducerConfig):
    """No visual tokens: a lower bound for the success of policies that see."""

    summary: ClassVar[str] = "so that it sees nothing: a floor to compare with"

    def build(self, layout: TokenLayout) -> Reducer:
        return BlindReducer(layout.token_grid)


class BlindReducer(Reducer):
    """A reducer with zero tokens. It is never called: with `num_tokens` 0 the vision tower does not run."""

    def __init__(self, token_grid: tuple[int, int]) -> None:
        super().__init__(token_grid, 1)
        self._num_tokens = self.num_tokens_max = 0
