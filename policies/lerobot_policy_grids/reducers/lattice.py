"""Regular lattices: fixed positions, independent of the image.

`uniform` reads the map at the lattice's points; predicted coordinates must do better than this. `pool` averages the map
over the lattice's cells, as many vision-language models do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from ..errors import BudgetError
from .anchors import Region, region_cells
from .base import CameraBudgetConfig, MapReducer, ReducerConfig, Sampled
from .interpolation import bilinear
from .layout import TokenLayout, cell_coordinates

# Largest ratio of the sides of a lattice cell; longer cells do not sample the image evenly.
MAX_STRETCH = 3.0


def lattice_shape(num_tokens: int, token_grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the lattice with exactly `num_tokens` points whose cells are nearest to square.

    Args:
        num_tokens: K, the number of points.
        token_grid: (H, W) of the map that the lattice covers.

    Raises:
        BudgetError: If K has no such factors; the message names budgets that do.
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


class LatticeReducer(MapReducer):
    """A reducer whose k tokens lie on the most even lattice of the image.

    Args:
        token_grid: (H, W) of the feature maps.
        num_tokens: K, the initial budget.
        **options: Further arguments of `MapReducer`. Letterbox padding outside their regions is left out.

    Raises:
        BudgetError: If a budget makes no even lattice.
    """

    def check_budget(self, num_tokens: int) -> None:
        """Raise `BudgetError` if `num_tokens` points make no even lattice."""
        for region in self.regions:
            self.lattice(num_tokens, region)

    def lattice(self, num_tokens: int, region: Region) -> tuple[int, int]:
        """Rows and columns of the lattice with `num_tokens` points over a region."""
        rows, columns = region_cells(*self.token_grid, region)
        return lattice_shape(num_tokens, (rows.stop - rows.start, columns.stop - columns.start))


@ReducerConfig.register_subclass("uniform")
@dataclass
class UniformConfig(CameraBudgetConfig):
    """Reads the feature map at a fixed lattice."""

    summary: ClassVar[str] = "read at a fixed lattice"

    def build(self, layout: TokenLayout) -> "UniformReducer":
        return UniformReducer(layout.token_grid, **self.arguments(layout))


class UniformReducer(LatticeReducer):
    """Bilinear reading at the centres of the lattice's cells."""

    def reduce(self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region) -> Sampled:
        height, width = self.token_grid
        shape = self.lattice(k, region)
        coordinates = cell_coordinates(shape, feature_map.device, region).expand(len(feature_map), -1, -1)
        pixels = coordinates * coordinates.new_tensor([width, height]) - 0.5
        return Sampled(bilinear(feature_map, pixels), coordinates)

    def reads(self, k: int, camera: int = 0) -> tuple[float, float]:
        return 1.0, 1.0


@ReducerConfig.register_subclass("pool")
@dataclass
class PoolConfig(CameraBudgetConfig):
    """Averages the feature map over blocks."""

    summary: ClassVar[str] = "averages of blocks of the image"

    def build(self, layout: TokenLayout) -> "PoolReducer":
        return PoolReducer(layout.token_grid, **self.arguments(layout))


class PoolReducer(LatticeReducer):
    """`F.adaptive_avg_pool2d` to the lattice's cells."""

    def reduce(self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region) -> Sampled:
        height, width = self.token_grid
        shape = self.lattice(k, region)
        rows, columns = region_cells(height, width, region)
        image = feature_map[:, rows, columns].permute(0, 3, 1, 2)
        tokens = functional.adaptive_avg_pool2d(image, shape).flatten(2).transpose(1, 2)
        read = (columns.start / width, rows.start / height, columns.stop / width, rows.stop / height)
        coordinates = cell_coordinates(shape, feature_map.device, read)
        return Sampled(tokens, coordinates.expand(len(feature_map), -1, -1))

    def reads(self, k: int, camera: int = 0) -> tuple[float, float]:
        region = self.region_of(camera)
        down, across = self.lattice(k, region)
        rows, columns = region_cells(*self.token_grid, region)
        return _half_block(columns.stop - columns.start, across), _half_block(rows.stop - rows.start, down)


def _half_block(cells: int, blocks: int) -> float:
    """Half of the cells of a block; where blocks are not whole cells, neighbours share the cells between them."""
    return cells / blocks / 2 + (0.5 if cells % blocks else 0.0)
