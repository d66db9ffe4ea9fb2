"""GridSampler: K continuous image coordinates, predicted from context, read from a feature map.

After "GridS: Differentiable Grid Sampler" (Feng et al., ICML 2026, arXiv 2605.11817): global coordinate
prediction, then grid sampling with geometry injection. Axes used in shapes, and coordinates: as in `base`.

Differs from the published reference:
- Coordinates are an anchor plus a learned offset, sigmoid(logit(anchor) + offset), and offsets start at
  zero. An untrained sampler reads a spread of K cells; the reference starts with all K at the centre.
- Anchors are ordered, so the first k serve any budget k <= num_tokens_max. The reference fixes K.
- Coordinates are float32 whatever the dtype of the model, and a coordinate of exactly 0 or 1 is read at the
  border. The reference reads zeros there, which happens in bfloat16.
- A token is the mean around its coordinate, over as many cells as it stands for, and not the value between four
  cells: few such values miss what lies between them. At k = n both are the same.
- The pooled features pass a LayerNorm before the coordinate head, which otherwise saturates; language,
  robot state and camera identity may join them as context.
- The geometry embedding starts at zero, so that at k = n the output equals the dense tokens exactly.
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

# Beyond this the sigmoid is 0 or 1 in float32, and its exponential stays finite.
MAX_OFFSET = 60.0
# Spread of the logits of free coordinates: the reference starts with all points within 0.1 cell of the centre.
FREE_SPREAD = 0.02
CONTEXTS = ("image", "language", "state", "camera")


@ReducerConfig.register_subclass("grids")
@dataclass
class GridSamplerConfig(CameraBudgetConfig):
    """GridS: tokens read at predicted coordinates."""

    summary: ClassVar[str] = (
        "read at places that it chooses itself (GridS, [arXiv 2605.11817](https://arxiv.org/abs/2605.11817))"
    )

    condition_on: list[str] = field(
        default_factory=lambda: list(CONTEXTS),
        metadata={"help": f"What the coordinates depend on: any of {CONTEXTS}."},
    )
    hidden_width: int = field(default=512, metadata={"help": "Hidden units of the coordinate head."})
    geometry_width: int = field(default=256, metadata={"help": "Hidden units of the geometry embedding; 0 for none."})
    anchored: bool = field(
        default=True,
        metadata={"help": "Whether each coordinate starts at an anchor of its own, or, as in the paper, all freely."},
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
            **self.budgets(layout),
            # A policy without proprioception has no state to depend on.
            condition_on=[name for name in self.condition_on if name != "state" or layout.state_width > 0],
            language_width=layout.language_width,
            state_width=layout.state_width,
            num_cameras=len(layout.cameras),
            region=layout.region,
            hidden_width=self.hidden_width,
            geometry_width=self.geometry_width,
            anchored=self.anchored,
            interpolation=self.interpolation,
        )


class Float32MLP(nn.Module):
    """Two layers with a ReLU between, always computed in float32, starting as the zero function.

    A module cast to bfloat16 keeps bfloat16 weights; its arithmetic and its output stay float32.
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
        token_grid: (H, W) of the feature maps it will read.
        width: C, channels of a token.
        num_tokens: K, the budget it starts with.
        num_tokens_max: Largest budget this sampler can serve. Defaults to `num_tokens`.
        condition_on: Which of "image", "language", "state", "camera" the coordinates depend on. With none
            of them the coordinates are learned but the same for every image.
        language_width: Channels of the pooled instruction, if "language" is among them.
        state_width: Dimensions of the robot state, if "state" is among them.
        num_cameras: Number of cameras that share this sampler.
        camera_limits: Of some cameras, by number, the most tokens they get, however large the budget.
        region: Where the camera image lies in what the vision tower sees; the rest is letterbox padding, where
            no token starts unless all do.
        hidden_width: Hidden units of the coordinate head (paper: 512).
        geometry_width: Hidden units of the geometry embedding (paper: 256); 0 for none.
        anchored: Whether each coordinate starts at its anchor. Otherwise, as in the paper, all are predicted freely
            and start close to the centre.
        interpolation: "antialiased" for the mean around a coordinate, over as many cells as a token stands for;
            "bilinear", as in the paper, between the four cells around it; "nearest" for the cell that it lies in,
            through which no gradient reaches the coordinates.

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
        region: Region = WHOLE,
        hidden_width: int = 512,
        geometry_width: int = 256,
        anchored: bool = True,
        interpolation: str = "antialiased",
    ) -> None:
        super().__init__(token_grid, num_tokens, num_tokens_max=num_tokens_max, camera_limits=camera_limits)
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
            # Points that start at one place and move alike would stay one point.
            nn.init.normal_(self.coordinate_head.out.bias, std=FREE_SPREAD)
        self.interpolation = interpolation
        # The camera image, without padding: its cells are shared among the tokens.
        self.image_rows, self.image_columns = region_cells(height, columns, region)
        self.geometry = Float32MLP(2, geometry_width, width) if geometry_width > 0 else None

        # Saved with the weights: offsets mean nothing without the anchors they were learned from.
        self.anchor_cells: Tensor
        self.register_buffer("anchor_cells", anchor_cells(height, columns, self.num_tokens_max, region))
        self.grid_size: Tensor
        self.register_buffer("grid_size", torch.tensor([columns, height]), persistent=False)
        self.image_corner: Tensor
        corner = torch.tensor([self.image_columns.start, self.image_rows.start])
        self.register_buffer("image_corner", corner, persistent=False)

    def forward(
        self, feature_map: Tensor, context: Mapping[str, Tensor] | None = None, num_tokens: int | None = None
    ) -> Sampled:
        """Sample k tokens of each feature map.

        Args:
            feature_map: [b, h, w, c], the dense visual tokens of an image as a map.
            context: What `condition_on` names besides the image: "language" [b, language_width], "state"
                [b, state_width], "camera" int64 [b], the index of the camera.
            num_tokens: k of this call. Defaults to the budget.

        Returns:
            `Sampled(tokens [b, k, c], coordinates float32 [b, k, 2])`.

        Raises:
            TokenGridError: If the map's grid is not `token_grid`.
        """
        self.check_grid(feature_map)
        with in_float32(feature_map):
            pixels, coordinates = self._predict(feature_map, context or {}, num_tokens or self.num_tokens)
            tokens = self._read(feature_map, pixels)
            if self.geometry is not None:
                tokens = tokens + self.geometry(coordinates).to(tokens.dtype)
        return Sampled(tokens, coordinates)

    def _read(self, feature_map: Tensor, pixels: Tensor) -> Tensor:
        """Tokens [b, k, c] at pixels [b, k, 2]."""
        image = feature_map[:, self.image_rows, self.image_columns]
        reach = math.sqrt(image.shape[1] * image.shape[2] / pixels.shape[1])
        if self.interpolation == "antialiased" and reach > 1:
            return antialiased(image, pixels - self.image_corner, reach)
        return bilinear(feature_map, pixels.round() if self.interpolation == "nearest" else pixels)

    def _predict(self, feature_map: Tensor, context: Mapping[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
        """Predict where to look: float32 pixels and coordinates, each [b, k, 2]."""
        offsets = self.coordinate_head(self._context(feature_map, context))
        offsets = offsets.unflatten(-1, (self.num_tokens_max, 2))[:, :k]
        # Raster order: the trunk meets the tokens in the order in which it met the dense grid.
        order = self._raster_order(k)
        cells, offsets = self._starts(order), offsets[:, order]
        anchors = (cells + 0.5) / self.grid_size
        # sigmoid(logit(a) + d) - a in closed form: exactly 0 at d = 0, which the logit and back is not.
        growth = torch.expm1(offsets.clamp(-MAX_OFFSET, MAX_OFFSET))
        shift = anchors * (1 - anchors) * growth / (1 + anchors * growth)
        return cells + shift * self.grid_size, (anchors + shift).clamp(0.0, 1.0)

    def _raster_order(self, k: int) -> Tensor:
        cells = self.anchor_cells[:k]
        return (cells[:, 1] * self.token_grid[1] + cells[:, 0]).argsort()

    def _starts(self, order: Tensor) -> Tensor:
        """Cells [k, 2], (column, row), that offsets count from."""
        if self.anchored:
            return self.anchor_cells[order]
        return ((self.grid_size - 1) / 2).expand(len(order), 2)

    def anchors(self, k: int) -> Tensor:
        """Coordinates [k, 2] that the first k tokens start from, row by row with what `forward` returns."""
        return (self._starts(self._raster_order(k)) + 0.5) / self.grid_size

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
