"""What every reducer is: a module that hands the trunk fewer visual tokens, within a budget. Torch only.

Axes used in shapes: b batch, h and w rows and columns of the token grid, n = h * w, c channels, k tokens that are
left. Coordinates are (x, y) in [0, 1] of the image the vision tower saw; the centre of column i is at
x = (i + 0.5) / w.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import BudgetError, TokenGridError


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
    """Replace the h * w visual tokens of an image by k.

    Args:
        token_grid: (H, W) of the feature maps it will read.
        num_tokens: K, the budget it starts with.
        num_tokens_max: Largest budget it can serve. Defaults to `num_tokens`.
        camera_limits: Of some cameras, by number, the most tokens they get, however large the budget.

    Raises:
        BudgetError: If a budget is not within 1 .. H * W.
    """

    # Names of what `forward` wants in its context besides the feature map.
    condition_on: tuple[str, ...] = ()
    # Whether it drops tokens between layers of the trunk, and not before it.
    in_trunk = False

    def __init__(
        self,
        token_grid: tuple[int, int],
        num_tokens: int,
        *,
        num_tokens_max: int | None = None,
        camera_limits: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        height, width = token_grid
        self.token_grid = (height, width)
        self.num_tokens_max = num_tokens if num_tokens_max is None else num_tokens_max
        if not 1 <= self.num_tokens_max <= height * width:
            raise BudgetError(
                f"num_tokens={self.num_tokens_max} per camera, but the policy's token grid is {height} x {width} "
                f"= {height * width}; choose 1 .. {height * width}"
            )
        self._num_tokens: int
        self.num_tokens = num_tokens
        self.camera_limits = dict(camera_limits or {})

    @property
    def num_tokens(self) -> int:
        """K, tokens per camera. May be set to any 1 .. num_tokens_max between calls."""
        return self._num_tokens

    @num_tokens.setter
    def num_tokens(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise BudgetError(f"num_tokens={value!r} is no whole number; give one from 1 .. {self.num_tokens_max}")
        if not 1 <= value <= self.num_tokens_max:
            raise BudgetError(
                f"num_tokens={value}, but this policy serves 1 .. {self.num_tokens_max} tokens per camera; "
                "choose a budget in that range, or train with a larger num_tokens_max"
            )
        self.check_budget(int(value))
        self._num_tokens = int(value)

    def check_budget(self, num_tokens: int) -> None:
        """Raise `BudgetError` if this reducer cannot serve a budget of 1 .. num_tokens_max; most serve all."""

    def tokens_of(self, camera: int) -> int:
        """Tokens that a camera gets under the present budget."""
        return min(self.num_tokens, self.camera_limits.get(camera, self.num_tokens))

    def extra_repr(self) -> str:
        """Say how the policy was changed, where it is printed."""
        height, width = self.token_grid
        text = f"{height}x{width} grid -> {self.num_tokens} tokens (max {self.num_tokens_max})"
        return f"{text}, condition_on={list(self.condition_on)}" if self.condition_on else text

    def check_grid(self, feature_map: Tensor) -> None:
        """Raise `TokenGridError` unless a map [b, h, w, c] has the grid this reducer was built for."""
        if tuple(feature_map.shape[1:3]) != self.token_grid:
            raise TokenGridError(
                f"feature map of {tuple(feature_map.shape[1:3])} tokens, but this reducer was built for "
                f"{self.token_grid}; use the image size the checkpoint was trained with"
            )
