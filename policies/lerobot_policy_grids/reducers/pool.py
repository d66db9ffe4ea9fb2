"""Pool: average the feature map over blocks. What vision-language models do when they must have fewer tokens."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from ..anchors import WHOLE, Region
from ..reducer import Reducer, Sampled
from .lattice import lattice_coordinates, lattice_shape


class PoolReducer(Reducer):
    """`F.adaptive_avg_pool2d` to the most even lattice of k blocks.

    Args:
        token_grid: (H, W) of the feature maps.
        num_tokens: K.
        region: Where the camera image lies in what the vision tower sees; cells of letterbox padding are left out.
        **options: As of `Reducer`.
    """

    def __init__(self, token_grid: tuple[int, int], num_tokens: int, *, region: Region = WHOLE, **options: Any) -> None:
        super().__init__(token_grid, num_tokens, **options)
        height, width = self.token_grid
        left, top, right, bottom = region
        # Cells whose centre shows the image.
        self.rows = slice(round(top * height), max(round(bottom * height), round(top * height) + 1))
        self.columns = slice(round(left * width), max(round(right * width), round(left * width) + 1))
        self._shape(num_tokens)

    def _shape(self, num_tokens: int) -> tuple[int, int]:
        cells = (self.rows.stop - self.rows.start, self.columns.stop - self.columns.start)
        return lattice_shape(num_tokens, cells)

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
        shape = self._shape(num_tokens or self.num_tokens)
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
