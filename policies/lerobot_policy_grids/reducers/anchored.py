"""What samplers share: anchors in the picture of each camera, and the order of the tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import GridsError
from .anchors import WHOLE, Region, anchor_cells, region_cells
from .base import CameraBudgetConfig, MapReducer
from .layout import TokenLayout


@dataclass
class AnchoredSamplerConfig(CameraBudgetConfig):
    """Base of the configurations of samplers whose coordinates depend on some context.

    Such a sampler may also work inside the vision tower: coordinates are predicted from the hidden states after some
    layers and tokens are read there, so that the later layers, and the last norm, run on the tokens alone. The
    position of a patch is part of its state by then.

    Attributes:
        contexts: What they may depend on.
    """

    contexts: ClassVar[tuple[str, ...]] = ()

    condition_on: list[str] = field(default_factory=list, metadata={"help": "What the coordinates depend on."})
    sample_after_layer: int | None = field(
        default=None,
        metadata={
            "help": "L: sample inside the vision tower, after its first L layers, from 0 (after the embeddings) to all "
            "(before the last norm). Defaults to none, after the whole tower and its last norm."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        layer = self.sample_after_layer
        if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
            raise GridsError(f"sample_after_layer={layer!r}; give a number of layers, 0 or more, or drop it")
        unknown = sorted(set(self.condition_on) - set(self.contexts))
        if unknown:
            raise GridsError(f"condition_on holds {unknown}; choose any of {', '.join(self.contexts)}")

    @property
    def inside(self) -> int | None:
        return self.sample_after_layer

    def arguments(self, layout: TokenLayout) -> dict[str, Any]:
        widths = {"language": layout.language_width, "state": layout.state_width}
        missing = {name for name, width in widths.items() if width == 0}
        return {
            **super().arguments(layout),
            # Some policies have no robot state, some read no instruction.
            "condition_on": [name for name in self.condition_on if name not in missing],
            "language_width": layout.language_width,
            "state_width": layout.state_width,
            "num_cameras": len(layout.cameras),
            "block": layout.block,
        }


class AnchoredSampler(MapReducer):
    """A reducer whose coordinates start at anchors: cells that are spread over the picture, for every k.

    Args:
        token_grid: (H, W) of the feature maps.
        num_tokens: K, the initial budget.
        regions: Where the image of each camera lies in the vision tower's input; one region is every camera's. The
            rest is letterbox padding, and its anchors come last.
        **options: Further arguments of `MapReducer`.
    """

    def __init__(
        self, token_grid: tuple[int, int], num_tokens: int, *, regions: Sequence[Region] = (WHOLE,), **options: Any
    ) -> None:
        super().__init__(token_grid, num_tokens, regions=regions, **options)
        height, columns = self.token_grid
        # Anchors [r, num_tokens_max, 2] of each different region, and the first cell [r, 2] of its image. They follow
        # from the grid and the cameras, so they are not saved.
        different = tuple(dict.fromkeys(self.regions))
        self._number_of = {region: number for number, region in enumerate(different)}
        images = [region_cells(height, columns, region) for region in different]
        self.anchor_cells: Tensor
        self.image_corners: Tensor
        self.grid_size: Tensor
        for name, value in {
            "anchor_cells": torch.stack([anchor_cells(height, columns, self.num_tokens_max, r) for r in different]),
            "image_corners": torch.tensor([[across.start, down.start] for down, across in images]),
            "grid_size": torch.tensor([columns, height]),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def image_of(self, feature_map: Tensor, region: Region) -> tuple[Tensor, Tensor]:
        """(The camera's image without padding [b, h * block, w * block, c], its first cell [2], (column, row))."""
        rows, columns = (
            slice(self.block * part.start, self.block * part.stop) for part in region_cells(*self.token_grid, region)
        )
        return feature_map[:, rows, columns], self.image_corners[self._number_of[region]]

    def reach(self, image: Tensor, k: int) -> float:
        """Distance in cells between k tokens that are spread over an image [b, h * block, w * block, c]."""
        return math.sqrt(image.shape[1] * image.shape[2] / k) / self.block

    def spacing(self, k: int, camera: int) -> float:
        """`reach` for the image of a camera."""
        rows, columns = region_cells(*self.token_grid, self.region_of(camera))
        return math.sqrt((rows.stop - rows.start) * (columns.stop - columns.start) / k)

    def cells_of(self, region: Region) -> Tensor:
        """Anchors int64 [num_tokens_max, 2], (column, row), of an image that lies in `region`."""
        return self.anchor_cells[self._number_of[region]]

    def raster_order(self, cells: Tensor) -> Tensor:
        """The order of the tokens with these anchors: the trunk was trained with the dense grid row by row."""
        return (cells[:, 1] * self.token_grid[1] + cells[:, 0]).argsort()

    def starts(self, cells: Tensor) -> Tensor:
        """Cells [k, 2] where the tokens with these anchors start."""
        return cells

    def anchors(self, k: int, camera: int = 0) -> Tensor:
        """Initial coordinates [k, 2] of the first k tokens of a camera, in the order of `forward`."""
        cells = self.cells_of(self.region_of(camera))[:k]
        return (self.starts(cells[self.raster_order(cells)]) + 0.5) / self.grid_size


class Float32MLP(nn.Module):
    """Two linear layers with a ReLU between them, computed in float32; the initial output is zero.

    After a cast to bfloat16 the weights are bfloat16, but arithmetic and output stay float32.
    """

    def __init__(self, width_in: int, width_hidden: int, width_out: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width_in, width_hidden)
        self.out = nn.Linear(width_hidden, width_out)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(linear32(self.hidden, x))
        return linear32(self.out, x)


def linear32(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in float32, whatever its weights are."""
    bias = None if layer.bias is None else layer.bias.float()
    return nn.functional.linear(x.float(), layer.weight.float(), bias)


def norm32(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """A LayerNorm in float32, whatever its weights are."""
    return nn.functional.layer_norm(
        x.float(), layer.normalized_shape, layer.weight.float(), layer.bias.float(), layer.eps
    )
