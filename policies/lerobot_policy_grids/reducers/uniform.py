"""Uniform: read the feature map at a fixed lattice. What coordinates must beat to be worth predicting."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..anchors import WHOLE, Region
from ..reducer import Reducer, Sampled
from ..sampler import read_feature_map
from .lattice import cells_within, lattice_coordinates, lattice_shape


class UniformReducer(Reducer):
    """Bilinear reading at the centres of the most even lattice of k cells.

    Args:
        token_grid: (H, W) of the feature maps.
        num_tokens: K.
        region: Where the camera image lies in what the vision tower sees; the lattice covers only that.
        **options: As of `Reducer`.
    """

    def __init__(self, token_grid: tuple[int, int], num_tokens: int, *, region: Region = WHOLE, **options: Any) -> None:
        # Before the budget is set, which it decides about.
        self.region, self.cells = region, cells_within(token_grid, region)
        super().__init__(token_grid, num_tokens, **options)

    def check_budget(self, num_tokens: int) -> None:
        """Raise `BudgetError` if so many tokens make no even lattice."""
        lattice_shape(num_tokens, self.cells)

    def forward(
        self, feature_map: Tensor, context: Mapping[str, Tensor] | None = None, num_tokens: int | None = None
    ) -> Sampled:
        """Sample k tokens of each feature map [b, h, w, c] at the same places.

        Raises:
            BudgetError: If k makes no even lattice.
            TokenGridError: If the map's grid is not `token_grid`.
        """
        self.check_grid(feature_map)
        height, width = self.token_grid
        shape = lattice_shape(num_tokens or self.num_tokens, self.cells)
        coordinates = lattice_coordinates(shape, self.region).to(feature_map.device)
        coordinates = coordinates.expand(len(feature_map), -1, -1)
        pixels = coordinates * coordinates.new_tensor([width, height]) - 0.5
        return Sampled(read_feature_map(feature_map, pixels), coordinates)
