"""Pool: average the feature map over blocks. What vision-language models do when they must have fewer tokens."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from ..reducer import Sampled
from .lattice import LatticeReducer, lattice_coordinates


class PoolReducer(LatticeReducer):
    """`F.adaptive_avg_pool2d` to the lattice's cells."""

    def forward(
        self, feature_map: Tensor, context: Mapping[str, Tensor] | None = None, num_tokens: int | None = None
    ) -> Sampled:
        """Average blocks of each feature map [b, h, w, c].

        Raises:
            BudgetError: If k makes no even lattice.
            TokenGridError: If the map's grid is not `token_grid`.
        """
        self.check_grid(feature_map)
        height, width = self.token_grid
        shape = self.lattice(num_tokens or self.num_tokens)
        image = feature_map[:, self.rows, self.columns].permute(0, 3, 1, 2)
        tokens = functional.adaptive_avg_pool2d(image, shape).flatten(2).transpose(1, 2)
        rows, columns = self.rows, self.columns
        region = (columns.start / width, rows.start / height, columns.stop / width, rows.stop / height)
        coordinates = lattice_coordinates(shape, region).to(feature_map.device)
        return Sampled(tokens, coordinates.expand(len(feature_map), -1, -1))
