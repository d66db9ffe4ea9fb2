"""What every reducer is: a module that hands the trunk fewer visual tokens, and the configuration it is built from.

Axes used in shapes: b batch, h and w rows and columns of the token grid, n = h * w, c channels, k tokens that are
left. Coordinates are (x, y) in [0, 1] of the image the vision tower saw; the centre of column i is at
x = (i + 0.5) / w. Reducers know torch, and nothing of LeRobot.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import draccus
import torch
from torch import Tensor, nn

from ..errors import BudgetError, TokenGridError
from .layout import TokenLayout


@dataclass
class ReducerConfig(draccus.ChoiceRegistry):
    """What a reducer is built from. A subclass registers the name by which it is chosen.

    Attributes:
        summary: What the k tokens are, for a model card: "K visual tokens per camera, <summary>".
        in_trunk: Whether the reducer drops tokens between layers of the trunk, and not before it.
    """

    summary: ClassVar[str] = ""
    in_trunk: ClassVar[bool] = False

    @classmethod
    def default_choice_name(cls) -> str:
        return "grids"

    @property
    def type(self) -> str:
        """The name by which this reducer is chosen."""
        return self.get_choice_name(type(self))

    @property
    def budget(self) -> int:
        """K, visual tokens per camera that the policy acts with."""
        return 0

    @property
    def largest(self) -> int:
        """Largest K that the reducer can serve at run time."""
        return 0

    def build(self, layout: TokenLayout) -> "Reducer":
        """Build the reducer for a policy with these visual tokens.

        Raises:
            BudgetError: If the budget does not fit the token grid.
        """
        raise NotImplementedError


@dataclass
class BudgetConfig(ReducerConfig):
    """Of every reducer that keeps some tokens."""

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

    def budgets(self, layout: TokenLayout) -> dict[str, Any]:
        """The arguments that the reducer takes about its budget.

        Raises:
            BudgetError: If the policy has fewer tokens than that, or no such camera.
        """
        if self.largest > layout.num_dense_tokens:
            height, width = layout.token_grid
            raise BudgetError(
                f"{self.largest} tokens per camera asked, but the dense policy has {height} x {width} = "
                f"{layout.num_dense_tokens}; choose 1 .. {layout.num_dense_tokens}, or 'dense' to train the policy as "
                "it is"
            )
        return {"num_tokens": self.num_tokens, "num_tokens_max": self.largest}


@dataclass
class CameraBudgetConfig(BudgetConfig):
    """Of every reducer that reduces each camera's tokens by themselves."""

    camera_tokens: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Cameras that get fewer tokens than K, and how many at most."}
    )

    def budgets(self, layout: TokenLayout) -> dict[str, Any]:
        for name, limit in self.camera_tokens.items():
            if name not in layout.cameras:
                raise BudgetError(f"camera_tokens names '{name}'; the policy's cameras are {', '.join(layout.cameras)}")
            if limit < 1:
                raise BudgetError(f"camera_tokens gives {limit} tokens to '{name}'; give at least 1")
        limits = {i: self.camera_tokens[name] for i, name in enumerate(layout.cameras) if name in self.camera_tokens}
        return {**super().budgets(layout), "camera_limits": limits}


class Sampled(NamedTuple):
    """What a reducer hands to the trunk.

    Attributes:
        tokens: [b, k, c], in raster order.
        coordinates: float32 [b, k, 2], (x, y) in [0, 1], row by row with `tokens`.
    """

    tokens: Tensor
    coordinates: Tensor


def in_float32(tensor: Tensor) -> AbstractContextManager[None]:
    """In this block autocast does not round: which tokens are kept must not depend on it."""
    # The meta device, on which costs are counted, knows no autocast.
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class Reducer(nn.Module):
    """Replace the h * w visual tokens of an image by k. Subclasses are `MapReducer`, `TrunkReducer` and `BlindReducer`.

    Args:
        token_grid: (H, W) of the feature maps it will read.
        num_tokens: K, the budget it starts with.
        num_tokens_max: Largest budget it can serve. Defaults to `num_tokens`.

    Raises:
        BudgetError: If a budget is not within 1 .. H * W.

    Attributes:
        condition_on: What a `MapReducer` wants in its context besides the feature map.
        in_trunk: Whether it is a `TrunkReducer`.
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
        # Training steps done under a token schedule, so that a saved policy goes on where it stopped.
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
            raise BudgetError(f"num_tokens={value!r} is no whole number; give one from 1 .. {self.num_tokens_max}")
        if self.num_tokens_max == 0:
            raise BudgetError(f"num_tokens={value}, but this policy is blind: it was trained without visual tokens")
        if not 1 <= value <= self.num_tokens_max:
            raise BudgetError(
                f"num_tokens={value}, but this policy serves 1 .. {self.num_tokens_max} tokens per camera; "
                "choose a budget in that range, or train with a larger num_tokens_max"
            )
        self.check_budget(int(value))
        self._num_tokens = int(value)

    def check_budget(self, num_tokens: int) -> None:
        """Raise `BudgetError` if this reducer cannot serve a budget of 1 .. num_tokens_max; most serve all."""

    def extra_repr(self) -> str:
        """Say how the policy was changed, where it is printed."""
        height, width = self.token_grid
        text = f"{height}x{width} grid -> {self.num_tokens} tokens (max {self.num_tokens_max})"
        return f"{text}, condition_on={list(self.condition_on)}" if self.condition_on else text


class MapReducer(Reducer):
    """A reducer between vision tower and trunk: it reads a feature map.

    Args:
        token_grid: (H, W) of the feature maps it will read.
        num_tokens: K, the budget it starts with.
        num_tokens_max: Largest budget it can serve. Defaults to `num_tokens`.
        camera_limits: Of some cameras, by number, the most tokens they get, however large the budget.
    """

    def __init__(
        self,
        token_grid: tuple[int, int],
        num_tokens: int,
        *,
        num_tokens_max: int | None = None,
        camera_limits: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(token_grid, num_tokens, num_tokens_max=num_tokens_max)
        self.camera_limits = dict(camera_limits or {})

    def tokens_of(self, camera: int) -> int:
        """Tokens that a camera gets under the present budget."""
        return min(self.num_tokens, self.camera_limits.get(camera, self.num_tokens))

    def forward(
        self, feature_map: Tensor, context: Mapping[str, Tensor] | None = None, num_tokens: int | None = None
    ) -> Sampled:
        """Reduce each feature map to k tokens.

        Args:
            feature_map: [b, h, w, c], the dense visual tokens of an image as a map.
            context: What `condition_on` names: "language" [b, l], "state" [b, s], "camera" int64 [b].
            num_tokens: k of this call. Defaults to the budget.

        Raises:
            TokenGridError: If the map's grid is not `token_grid`.
        """
        raise NotImplementedError

    def check_grid(self, feature_map: Tensor) -> None:
        """Raise `TokenGridError` unless a map [b, h, w, c] has the grid this reducer was built for."""
        if tuple(feature_map.shape[1:3]) != self.token_grid:
            raise TokenGridError(
                f"feature map of {tuple(feature_map.shape[1:3])} tokens, but this reducer was built for "
                f"{self.token_grid}; use the image size the checkpoint was trained with"
            )


@ReducerConfig.register_subclass("blind")
@dataclass
class BlindConfig(ReducerConfig):
    """No visual tokens at all: the floor that any way of looking must beat."""

    summary: ClassVar[str] = "so that it sees nothing: a floor to compare with"

    def build(self, layout: TokenLayout) -> Reducer:
        return BlindReducer(layout.token_grid)


class BlindReducer(Reducer):
    """Hand the trunk zero tokens. It is never called: where `num_tokens` is 0 the vision tower does not run."""

    def __init__(self, token_grid: tuple[int, int]) -> None:
        super().__init__(token_grid, 1)
        self._num_tokens = self.num_tokens_max = 0
