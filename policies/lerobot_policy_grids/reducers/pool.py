"""Pool: average the feature map over blocks. What vision-language models do when they must have fewer tokens."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from ..anchors import WHOLE, Region
from ..reducer import Reducer, Sampled
from .lattice import cells_within, image_cells, lattice_coordinates, lattice_shape


class PoolReducer(Reducer):
    """`F.adaptive_avg_pool2d` to the most even lattice of k blocks.

    Args:
        token_grid: (H, W) of the feature maps.
        num_tokens: K.
        region: Where the camera image lies in what the vision tower sees; cells of letterbox padding are left out.
        **options: As of `Reducer`.
    """

    def __init__(self, token_grid: tuple[int, int], num_tokens: int, *, region: Region = WHOLE, **options: Any) -> None:
        # Before the budget is set, which they decide about.
        self.rows, self.columns = image_cells(token_grid, region)
        self.cells = cells_within(token_grid, region)
        super().__init__(token_grid, num_tokens, **options)

    def check_budget(self, num_tokens: int) -> None:
        """Raise `BudgetError` if so many tokens make no even lattice."""
        lattice_shape(num_tokens, self.cells)

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
        shape = lattice_shape(num_tokens or self.num_tokens, self.cells)
        image = feature_map[:, self.rows, self.columns].permute(0, 3, 1, 2)
        tokens = functional.adaptive_avg_pool2d(image, shape).flatten(2).transpose(1, 2)
        region = (
            self.columns.start / width,
            self.rows.start / height,
            self.columns.stop / width,
            self.rows.stop / height,
        )
        coordinates = lattice_coordinates(shape, region).to(feature_map.device)
        return Sampled(tokens, coordinates.expand(len(feature_map), -1, -1))
