"""MeanSampler: predict K continuous image coordinates from the mean of the feature map, and read the map there.

A mean does not know where anything is, so these points hardly follow the image. `grid_sampler` reads coordinates off
the map instead.

After "GridS: Differentiable Grid Sampler" (Feng et al., ICML 2026, arXiv 2605.11817): global coordinate
prediction, then grid sampling with geometry injection. `base` defines the axes in shapes and the coordinates.

Differences from the published reference:
- A coordinate is an anchor plus a learned offset, sigmoid(logit(anchor) + offset), and offsets start at zero. An
  untrained sampler reads K cells spread over the image; the reference starts where its initialisation puts the points.
- Anchors are ordered, so the first k work for any budget k <= num_tokens_max. The reference has a fixed K.
- Coordinates are float32 in every model, and a coordinate of exactly 0 or 1 is read at the border. The reference reads
  zeros there, and such coordinates occur in bfloat16.
- A token is the mean of the cells around its coordinate, over an area of n / k cells. The reference interpolates
  between four cells, so with few tokens it misses most cells. At k = n both are the same.
- A LayerNorm before the coordinate head keeps it from saturating on the pooled features. Language, robot state and
  camera identity can be further context.
- The geometry embedding starts at zero, so at k = n the output equals the dense tokens exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import GridsError
from .anchored import AnchoredSampler, AnchoredSamplerConfig, Float32MLP, norm32
from .anchors import Region
from .base import ReducerConfig, Sampled, in_float32
from .blocks import block_reach, patch_positions, spread
from .interpolation import INTERPOLATIONS, antialiased, bilinear
from .layout import TokenLayout

# At this offset the sigmoid is already 0 or 1 in float32, and the exponential is still finite.
MAX_OFFSET = 60.0
# Initial spread of the logits without anchors.
FREE_SPREAD = 0.02
CONTEXTS = ("image", "language", "state", "camera")


@ReducerConfig.register_subclass("mean")
@dataclass
class MeanSamplerConfig(AnchoredSamplerConfig):
    """The paper's head: tokens read at coordinates that are predicted from the mean of the map."""

    summary: ClassVar[str] = (
        "read at coordinates predicted from the image's mean features (GridS, "
        "[arXiv 2605.11817](https://arxiv.org/abs/2605.11817))"
    )

    contexts: ClassVar[tuple[str, ...]] = CONTEXTS

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
        if self.interpolation not in INTERPOLATIONS:
            raise GridsError(
                f"interpolation '{self.interpolation}' is unknown; choose one of {', '.join(INTERPOLATIONS)}"
            )

    def build(self, layout: TokenLayout) -> "MeanSampler":
        return MeanSampler(
            layout.token_grid,
            layout.width,
            **self.arguments(layout),
            hidden_width=self.hidden_width,
            geometry_width=self.geometry_width,
            anchored=self.anchored,
            interpolation=self.interpolation,
        )


class MeanSampler(AnchoredSampler):
    """Replace the h * w visual tokens of an image by k tokens read at predicted coordinates.

    Args:
        token_grid: (H, W) of the feature maps.
        width: C, channels of a token.
        num_tokens: K, the initial budget.
        condition_on: Which of "image", "language", "state", "camera" the coordinates depend on. Without any, the
            coordinates are learned but the same for every image.
        language_width: Channels of the pooled instruction, if `condition_on` has "language".
        state_width: Dimensions of the robot state, if `condition_on` has "state".
        num_cameras: Number of cameras that share this sampler.
        hidden_width: Hidden units of the coordinate head (paper: 512).
        geometry_width: Hidden units of the geometry embedding (paper: 256); 0 for none.
        anchored: Whether each coordinate starts at its anchor. If not, all start near the centre, as in the paper.
        interpolation: "antialiased" for the mean around a coordinate over an area of n / k cells; "bilinear", as in
            the paper, between the four cells around it; "nearest" for the cell at the coordinate, which gives the
            coordinates no gradient.
        **options: Further arguments of `AnchoredSampler`.

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
        condition_on: Sequence[str] = ("image",),
        language_width: int = 0,
        state_width: int = 0,
        num_cameras: int = 1,
        hidden_width: int = 512,
        geometry_width: int = 256,
        anchored: bool = True,
        interpolation: str = "antialiased",
        **options: Any,
    ) -> None:
        super().__init__(token_grid, num_tokens, **options)
        unknown = sorted(set(condition_on) - set(CONTEXTS))
        if unknown:
            raise ValueError(f"condition_on holds {unknown}; expected any of {list(CONTEXTS)}")
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation={interpolation!r}; expected one of {INTERPOLATIONS}")
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

    def reduce(self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region) -> Sampled:
        with in_float32(feature_map):
            pixels, coordinates = self._predict(feature_map, context, k, region)
            tokens = self._read(feature_map, pixels, region)
            if self.geometry is not None:
                tokens = tokens + spread(self.geometry(coordinates), self.block).to(tokens.dtype)
        return Sampled(tokens, coordinates)

    def reads(self, k: int, camera: int = 0) -> tuple[float, float]:
        patches = {"nearest": 0.5, "bilinear": 1.0}.get(self.interpolation, max(1.0, self.spacing(k, camera)))
        cells = block_reach(patches, self.block)
        return cells, cells

    def _read(self, feature_map: Tensor, pixels: Tensor, region: Region) -> Tensor:
        """Read tokens [b, k * block * block, c] at pixels [b, k, 2]."""
        # Each token covers an equal share of the picture.
        image, corner = self.image_of(feature_map, region)
        reach = self.reach(image, pixels.shape[1])
        if self.interpolation == "antialiased" and reach > 1:
            return antialiased(image, patch_positions(pixels - corner, self.block), reach)
        patches = patch_positions(pixels, self.block)
        return bilinear(feature_map, patches.round() if self.interpolation == "nearest" else patches)

    def _predict(
        self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region
    ) -> tuple[Tensor, Tensor]:
        """Predict float32 pixels and coordinates, each [b, k, 2]."""
        offsets = self.coordinate_head(self._context(feature_map, context))
        offsets = offsets.unflatten(-1, (self.num_tokens_max, 2))[:, :k]
        # Raster order, because the trunk was trained with the dense grid in that order.
        anchored = self.cells_of(region)[:k]
        order = self.raster_order(anchored)
        cells, offsets = self.starts(anchored[order]), offsets[:, order]
        anchors = (cells + 0.5) / self.grid_size
        # sigmoid(logit(a) + d) - a in closed form. It is exactly 0 at d = 0; sigmoid(logit(a)) would round.
        growth = torch.expm1(offsets.clamp(-MAX_OFFSET, MAX_OFFSET))
        shift = anchors * (1 - anchors) * growth / (1 + anchors * growth)
        return cells + shift * self.grid_size, (anchors + shift).clamp(0.0, 1.0)

    def starts(self, cells: Tensor) -> Tensor:
        return cells if self.anchored else ((self.grid_size - 1) / 2).expand(len(cells), 2)

    def _context(self, feature_map: Tensor, context: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for name in self.condition_on:
            if name == "image":
                # Global average pooling (paper, coordinate prediction), in float32.
                part = feature_map.float().mean(dim=(1, 2))
            elif name == "camera":
                part = (context[name][:, None] == torch.arange(self.num_cameras, device=context[name].device)).float()
            else:
                part = context[name].float()
            if name in self.norms:
                part = norm32(self.norms[name], part)  # type: ignore[arg-type]
            parts.append(part)
        return torch.cat(parts, dim=-1) if parts else feature_map.new_zeros(feature_map.shape[0], 1).float()
