"""The visual tokens of a policy: their grid, and its cells as a row-major list."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .anchors import Region


@dataclass(frozen=True)
class TokenLayout:
    """The visual tokens that a base policy gives its trunk.

    Attributes:
        token_grid: (H, W) of one camera's feature map.
        width: C, channels of a visual token.
        cameras: Feature keys of the cameras, in the policy's order.
        language_width: Channels of an embedded language token.
        state_width: Dimensions of the (padded) robot state; 0 for a policy without one.
        region: The part of the vision tower's input that holds the image of at least one camera; the rest is padding.
        extra_tokens: Tokens per camera in front of the grid that are not cells of it; they are not reduced.
    """

    token_grid: tuple[int, int]
    width: int
    cameras: tuple[str, ...]
    language_width: int
    state_width: int
    region: Region
    extra_tokens: int = 0

    @property
    def num_dense_tokens(self) -> int:
        """N = H * W, visual tokens per camera of the dense policy."""
        return self.token_grid[0] * self.token_grid[1]


def cell_coordinates(token_grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Centres of all cells: float32 [H * W, 2], (x, y) in [0, 1], row by row."""
    height, width = token_grid
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid[1].flatten(), grid[0].flatten()], dim=-1)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """The rows [b, k, c] of a tensor [b, n, c] at an index [b, k]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
