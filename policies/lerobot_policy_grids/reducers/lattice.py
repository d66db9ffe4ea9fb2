"""Regular lattices: where fixed reducers read, whatever the image shows."""

import math
from typing import Any

import torch
from torch import Tensor

from ..anchors import WHOLE, Region, region_cells
from ..errors import BudgetError
from ..reducer import Reducer

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


class LatticeReducer(Reducer):
    """A reducer whose k tokens lie on the most even lattice of the image.

    Args:
        token_grid: (H, W) of the feature maps.
        num_tokens: K.
        region: Where the camera image lies in what the vision tower sees; letterbox padding is left out.
        **options: As of `Reducer`.

    Raises:
        BudgetError: If a budget makes no even lattice.
    """

    def __init__(self, token_grid: tuple[int, int], num_tokens: int, *, region: Region = WHOLE, **options: Any) -> None:
        # Before the budget is set, which they decide about.
        self.region = region
        self.rows, self.columns = region_cells(*token_grid, region)
        super().__init__(token_grid, num_tokens, **options)

    def check_budget(self, num_tokens: int) -> None:
        """Raise `BudgetError` if so many tokens make no even lattice."""
        self.lattice(num_tokens)

    def lattice(self, num_tokens: int) -> tuple[int, int]:
        """Rows and columns of the lattice of so many tokens."""
        cells = (self.rows.stop - self.rows.start, self.columns.stop - self.columns.start)
        return lattice_shape(num_tokens, cells)
