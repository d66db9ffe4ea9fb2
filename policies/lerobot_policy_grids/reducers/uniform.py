"""Uniform: read the feature map at a fixed lattice. What coordinates must beat to be worth predicting."""

from collections.abc import Mapping

from torch import Tensor

from ..interpolation import bilinear
from ..reducer import Sampled
from .lattice import LatticeReducer, lattice_coordinates


class UniformReducer(LatticeReducer):
    """Bilinear reading at the centres of the lattice's cells."""

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
        shape = self.lattice(num_tokens or self.num_tokens)
        coordinates = lattice_coordinates(shape, self.region).to(feature_map.device)
        coordinates = coordinates.expand(len(feature_map), -1, -1)
        pixels = coordinates * coordinates.new_tensor([width, height]) - 0.5
        return Sampled(bilinear(feature_map, pixels), coordinates)
