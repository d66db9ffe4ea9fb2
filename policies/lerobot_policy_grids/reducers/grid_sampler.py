"""GridSampler: predict K continuous image coordinates from context, and read a feature map there.

After "GridS: Differentiable Grid Sampler" (Feng et al., ICML 2026, arXiv 2605.11817): global coordinate
prediction, then grid sampling with geometry injection. `base` defines the axes in shapes and the coordinates.

Differences from the published reference:
- A coordinate is an anchor plus a learned offset, sigmoid(logit(anchor) + offset), and offsets start at zero. An
  untrained sampler reads K cells spread over the image; the reference starts with all K at the centre.
- Anchors are ordered, so the first k work for any budget k <= num_tokens_max. The reference has a fixed K.
- Coordinates are float32 in every model, and a coordinate of exactly 0 or 1 is read at the border. The reference reads
  zeros there, and such coordinates occur in bfloat16.
- A token is the mean of the cells around its coordinate, over an area of n / k cells. The reference interpolates
  between four cells, so with few tokens it misses most cells. At k = n both are the same.
- A LayerNorm before the coordinate head keeps it from saturating on the pooled features. Language, robot state and
  camera identity can be further context.
- The geometry embedding starts at zero, so at k = n the output equals the dense tokens exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import GridsError
from .anchors import WHOLE, Region, anchor_cells, region_cells
from .base import CameraBudgetConfig, MapReducer, ReducerConfig, Sampled, in_float32
from .interpolation import INTERPOLATIONS, antialiased, bilinear
from .layout import TokenLayout

# At this offset the sigmoid is already 0 or 1 in float32, and the exponential is still finite.
MAX_OFFSET = 60.0
# Initial spread of the logits without anchors. The reference starts all points within 0.1 cell of the centre.
FREE_SPREAD = 0.02
CONTEXTS = ("image", "language", "state", "camera")


@ReducerConfig.register_subclass("grids")
@dataclass
class GridSamplerConfig(CameraBudgetConfig):
    """GridS: tokens read at predicted coordinates."""

    summary: ClassVar[str] = (
        "read at coordinates that it predicts (GridS, [arXiv 2605.11817](https://arxiv.org/abs/2605.11817))"
    )

    condition_on: list[str] = field(
        default_factory=lambda: list(CONTEXTS),
        metadata={"help": f"What the coordinates depend on: any of {CONTEXTS}."},
    )
    hidden_width: int = field(default=512, metadata={"help": "Hidden units of the coordinate head."})
    geometry_width: int = field(default=256, metadata={"help": "Hidden units of the geometry embedding; 0 for none."})
    anchored: bool = field(
        default=True,
        metadata={
            "help": "Whether each coordinate starts at its own anchor. If not, all start near the centre (paper)."
        },
    )
    interpolation: str = field(
        default="antialiased", metadata={"help": f"How the feature map is read: one of {INTERPOLATIONS}."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.condition_on) - set(CONTEXTS))
        if unknown:
            raise GridsError(f"condition_on holds {unknown}; choose any of {', '.join(CONTEXTS)}")
        if self.interpolation not in INTERPOLATIONS:
            raise GridsError(
                f"interpolation '{self.interpolation}' is unknown; choose one of {', '.join(INTERPOLATIONS)}"
            )

    def build(self, layout: TokenLayout) -> "GridSampler":
        return GridSampler(
            layout.token_grid,
            layout.width,
            **self.arguments(layout),
            # Some policies have no robot state.
            condition_on=[name for name in self.condition_on if name != "state" or layout.state_width > 0],
            language_width=layout.language_width,
            state_width=layout.state_width,
            num_cameras=len(layout.cameras),
            hidden_width=self.hidden_width,
            geometry_width=self.geometry_width,
            anchored=self.anchored,
            interpolation=self.interpolation,
        )


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
        x = torch.relu(_linear32(self.hidden, x))
        return _linear32(self.out, x)


def _linear32(layer: nn.Linear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return nn.functional.linear(x.float(), layer.weight.float(), bias)


class GridSampler(MapReducer):
    """Replace the h * w visual tokens of an image by k tokens read at predicted coordinates.

    Args:
        token_grid: (H, W) of the feature maps.
        width: C, channels of a token.
        num_tokens: K, the initial budget.
        num_tokens_max: Largest budget that can be set. Defaults to `num_tokens`.
        condition_on: Which of "image", "language", "state", "camera" the coordinates depend on. Without any, the
            coordinates are learned but the same for every image.
        language_width: Channels of the pooled instruction, if `condition_on` has "language".
        state_width: Dimensions of the robot state, if `condition_on` has "state".
        num_cameras: Number of cameras that share this sampler.
        camera_limits: Largest number of tokens of some cameras, by camera number, whatever the budget.
        regions: Where the image of each camera lies in the vision tower's input; one region is every camera's. The
            rest is letterbox padding, and its anchors come last.
        hidden_width: Hidden units of the coordinate head (paper: 512).
        geometry_width: Hidden units of the geometry embedding (paper: 256); 0 for none.
        anchored: Whether each coordinate starts at its anchor. If not, all start near the centre, as in the paper.
        interpolation: "antialiased" for the mean around a coordinate over an area of n / k cells; "bilinear", as in
            the paper, between the four cells around it; "nearest" for the cell at the coordinate, which gives the
            coordinates no gradient.

    Raises:
        BudgetError: If a budget is not within 1 .. H * W.
        ValueError: If `condition_on` names an unknown context, or `interpolation` is unknown.
    """

    def __init__(
        self,
        token_grid: tuple[int, int],
        width: int,
        num_tokens: int,
        *,
        num_tokens_max: int | None = None,
        condition_on: Sequence[str] = ("image",),
        language_width: int = 0,
        state_width: int = 0,
        num_cameras: int = 1,
        camera_limits: Mapping[int, int] | None = None,
        regions: Sequence[Region] = (WHOLE,),
        hidden_width: int = 512,
        geometry_width: int = 256,
        anchored: bool = True,
        interpolation: str = "antialiased",
    ) -> None:
        super().__init__(
            token_grid, num_tokens, num_tokens_max=num_tokens_max, camera_limits=camera_limits, regions=regions
        )
        unknown = sorted(set(condition_on) - set(CONTEXTS))
        if unknown:
            raise ValueError(f"condition_on holds {unknown}; expected any of {list(CONTEXTS)}")
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation={interpolation!r}; expected one of {INTERPOLATIONS}")
        height, columns = token_grid
        self.width = width
        self.num_cameras = num_cameras
        self.condition_on = tuple(name for name in CONTEXTS if name in condition_on)

        widths = {"image": width, "language": language_width, "state": state_width, "camera": num_cameras}
        self.norms = nn.ModuleDict(
            {name: nn.LayerNorm(widths[name]) for name in self.condition_on if name in ("image", "language")}
        )
        context_width = sum(widths[name] for name in self.condition_on)
        self.coordinate_head = Float32MLP(max(context_width, 1), hidden_width, 2 * self.num_tokens_max)
        self.anchored = anchored
        if not anchored:
            # Points with equal start and equal gradients would stay equal.
            nn.init.normal_(self.coordinate_head.out.bias, std=FREE_SPREAD)
        self.interpolation = interpolation
        self.geometry = Float32MLP(2, geometry_width, width) if geometry_width > 0 else None

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

    def reduce(self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region) -> Sampled:
        with in_float32(feature_map):
            pixels, coordinates = self._predict(feature_map, context, k, region)
            tokens = self._read(feature_map, pixels, region)
            if self.geometry is not None:
                tokens = tokens + self.geometry(coordinates).to(tokens.dtype)
        return Sampled(tokens, coordinates)

    def _read(self, feature_map: Tensor, pixels: Tensor, region: Region) -> Tensor:
        """Read tokens [b, k, c] at pixels [b, k, 2]."""
        # The camera image without padding; each token covers an equal share of it.
        rows, columns = region_cells(*self.token_grid, region)
        image = feature_map[:, rows, columns]
        reach = math.sqrt(image.shape[1] * image.shape[2] / pixels.shape[1])
        if self.interpolation == "antialiased" and reach > 1:
            return antialiased(image, pixels - self.image_corners[self._number_of[region]], reach)
        return bilinear(feature_map, pixels.round() if self.interpolation == "nearest" else pixels)

    def _predict(
        self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region
    ) -> tuple[Tensor, Tensor]:
        """Predict float32 pixels and coordinates, each [b, k, 2]."""
        offsets = self.coordinate_head(self._context(feature_map, context))
        offsets = offsets.unflatten(-1, (self.num_tokens_max, 2))[:, :k]
        # Raster order, because the trunk was trained with the dense grid in that order.
        anchored = self.cells_of(region)[:k]
        order = self._raster_order(anchored)
        cells, offsets = self._starts(anchored[order]), offsets[:, order]
        anchors = (cells + 0.5) / self.grid_size
        # sigmoid(logit(a) + d) - a in closed form. It is exactly 0 at d = 0; sigmoid(logit(a)) would round.
        growth = torch.expm1(offsets.clamp(-MAX_OFFSET, MAX_OFFSET))
        shift = anchors * (1 - anchors) * growth / (1 + anchors * growth)
        return cells + shift * self.grid_size, (anchors + shift).clamp(0.0, 1.0)

    def cells_of(self, region: Region) -> Tensor:
        """Anchors int64 [num_tokens_max, 2], (column, row), of an image that lies in `region`."""
        return self.anchor_cells[self._number_of[region]]

    def _raster_order(self, cells: Tensor) -> Tensor:
        return (cells[:, 1] * self.token_grid[1] + cells[:, 0]).argsort()

    def _starts(self, cells: Tensor) -> Tensor:
        """Cells [k, 2] that the offsets are added to, of tokens with these anchors."""
        return cells if self.anchored else ((self.grid_size - 1) / 2).expand(len(cells), 2)

    def anchors(self, k: int, camera: int = 0) -> Tensor:
        """Initial coordinates [k, 2] of the first k tokens of a camera, in the order of `forward`."""
        cells = self.cells_of(self.region_of(camera))[:k]
        return (self._starts(cells[self._raster_order(cells)]) + 0.5) / self.grid_size

    def _context(self, feature_map: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for name in self.condition_on:
            if name == "image":
                # Global average pooling (paper, coordinate prediction), in float32.
                part = feature_map.float().mean(dim=(1, 2))
            elif name == "camera":
                part = nn.functional.one_hot(context[name], self.num_cameras).float()
            else:
                part = context[name].float()
            if name in self.norms:
                norm: nn.LayerNorm = self.norms[name]  # type: ignore[assignment]
                part = nn.functional.layer_norm(
                    part, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
                )
            parts.append(part)
        return torch.cat(parts, dim=-1) if parts else feature_map.new_zeros(feature_map.shape[0], 1).float()
