"""The visual tokens of a policy: their grid, and its cells as a row-major list."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .anchors import WHOLE, Region


@dataclass(frozen=True)
class TokenLayout:
    """The visual tokens that a base policy gives its trunk.

    Attributes:
        token_grid: (H, W) of one camera's feature map.
        width: C, channels of a visual token.
        cameras: Feature keys of the cameras that send images, in the policy's order.
        language_width: Channels of an embedded language token; 0 for a policy that reads no instruction.
        state_width: Dimensions of the (padded) robot state; 0 for a policy without one.
        regions: For each camera, the part of the vision tower's input that holds its image; the rest is padding.
        extra_tokens: Tokens per camera in front of the grid that are not cells of it; they are not reduced.
        block: Patches along a side of a cell in the map that is sampled: more than 1 inside a vision tower whose
            connector merges patches.
        projected: Whether the map is the one behind the projector, in a family that otherwise samples before it.
    """

    token_grid: tuple[int, int]
    width: int
    cameras: tuple[str, ...]
    language_width: int
    state_width: int
    regions: tuple[Region, ...]
    extra_tokens: int = 0
    block: int = 1
    projected: bool = False

    @property
    def num_dense_tokens(self) -> int:
        """N = H * W, visual tokens per camera of the dense policy."""
        return self.token_grid[0] * self.token_grid[1]

    @property
    def map_grid(self) -> tuple[int, int]:
        """Rows and columns of the map that is sampled: the token grid, or its patches."""
        return self.token_grid[0] * self.block, self.token_grid[1] * self.block


def cell_coordinates(
    shape: tuple[int, int], device: torch.device | str | None = None, region: Region = WHOLE
) -> Tensor:
    """Centres of the cells of a grid or a lattice.

    Args:
        shape: Its rows and columns.
        device: Where the result is needed.
        region: The part of the image that it covers, (left, top, right, bottom) in [0, 1].

    Returns:
        float32 [rows * columns, 2], (x, y) in [0, 1] of the image, row by row.
    """
    left, top, right, bottom = region
    rows, columns = shape
    y = top + (torch.arange(rows, device=device) + 0.5) / rows * (bottom - top)
    x = left + (torch.arange(columns, device=device) + 0.5) / columns * (right - left)
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid[1].flatten(), grid[0].flatten()], dim=-1)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """The rows [b, k, c] of a tensor [b, n, c] at an index [b, k]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over dim 1 of [b, m, n] where mask bool [b, m] is true."""
    weights = mask.float()[..., None]
    return (values * weights).sum(1) / weights.sum(1).clamp_min(1)
