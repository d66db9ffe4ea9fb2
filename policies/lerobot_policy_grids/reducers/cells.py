"""The cells of a token grid as a row-major list."""

import torch
from torch import Tensor


def cell_coordinates(token_grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Centres of all cells: float32 [H * W, 2], (x, y) in [0, 1], row by row."""
    height, width = token_grid
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid[1].flatten(), grid[0].flatten()], dim=-1)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [b, k, c] of [b, n, c] at an index [b, k]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
