"""Regular lattices: where fixed reducers read, whatever the image shows."""

import math

import torch
from torch import Tensor

from ..anchors import Region
from ..errors import BudgetError

# A lattice whose cells are more than this many times longer than wide samples no image evenly.
MAX_STRETCH = 3.0


def lattice_shape(num_tokens: int, token_grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the lattice of exactly `num_tokens` points whose cells are nearest to square.

    Args:
        num_tokens: K.
        token_grid: (H, W) of the map it covers.

    Raises:
        BudgetError: If K has no such factors; the message names budgets that have.
    """
    best = _nearest_to_square(num_tokens, token_grid)
    if best is None:
        height, width = token_grid
        fitting = [k for k in range(1, height * width + 1) if _nearest_to_square(k, token_grid) is not None]
        near = sorted(sorted(fitting, key=lambda k: abs(k - num_tokens))[:4])
        raise BudgetError(
            f"{num_tokens} tokens make no even lattice over a {height} x {width} grid; "
            f"choose one of {', '.join(map(str, near))}"
        )
    return best


def _nearest_to_square(num_tokens: int, token_grid: tuple[int, int]) -> tuple[int, int] | None:
    height, width = token_grid
    shapes = [(rows, num_tokens // rows) for rows in range(1, height + 1) if num_tokens % rows == 0]
    shapes = [(rows, columns) for rows, columns in shapes if columns <= width]

    def stretch(shape: tuple[int, int]) -> float:
        return abs(math.log((height / shape[0]) / (width / shape[1])))

    best = min(shapes, key=stretch, default=None)
    return best if best is not None and stretch(best) <= math.log(MAX_STRETCH) else None


def image_cells(token_grid: tuple[int, int], region: Region) -> tuple[slice, slice]:
    """Rows and columns of the token grid that show the image, and not only letterbox padding."""
    height, width = token_grid
    left, top, right, bottom = region
    first_row, first_column = round(top * height), round(left * width)
    rows = slice(first_row, max(round(bottom * height), first_row + 1))
    return rows, slice(first_column, max(round(right * width), first_column + 1))


def cells_within(token_grid: tuple[int, int], region: Region) -> tuple[int, int]:
    """How many rows and columns those are."""
    rows, columns = image_cells(token_grid, region)
    return rows.stop - rows.start, columns.stop - columns.start


def lattice_coordinates(shape: tuple[int, int], region: Region) -> Tensor:
    """Centres of the cells of a lattice over a part of the image.

    Args:
        shape: Rows and columns.
        region: (left, top, right, bottom) in [0, 1].

    Returns:
        float32 [rows * columns, 2], (x, y) in [0, 1], row by row.
    """
    left, top, right, bottom = region
    rows, columns = shape
    y = top + (torch.arange(rows) + 0.5) / rows * (bottom - top)
    x = left + (torch.arange(columns) + 0.5) / columns * (right - left)
    grid = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([grid[1].flatten(), grid[0].flatten()], dim=-1)
