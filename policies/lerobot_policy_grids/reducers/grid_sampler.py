"""GridSampler: read where to look off the feature map, and read the map there.

After "GridS: Differentiable Grid Sampler" (Feng et al., ICML 2026, arXiv 2605.11817): coordinate prediction, then
differentiable sampling with geometry injection. `base` defines the axes in shapes and the coordinates.

Each token has a query, made of its anchor, the instruction, the robot's state and the camera. The query scores the
cells in a window around the anchor. The mean of the cells' places, weighted by the scores, is the token's coordinate.
The map is read sharply at that coordinate. Where a token is a block of patches (`blocks`), cells are the means of their
patches, each patch of the token is read sharply, and what else goes into the token goes into each of them.

Differs from the published reference:
- The reference predicts coordinates from the mean of the map (`mean_sampler` does too). A mean does not know where
  anything is. Here coordinates are read off the map, and the instruction says what to look for.
- A coordinate starts at an anchor, and an untrained query is zero: then all k points lie on their anchors, spread over
  the image. The reference starts near the centre.
- Anchors are ordered, so the first k work for any budget k <= num_tokens_max. The reference has a fixed K.
- Coordinates are float32 in every model, and lie within the cells of the camera's image.
- What the scores weight, minus what is read, goes into the token through a projection of low rank that starts at zero.
- The geometry embedding starts at zero. At k = n every window is one cell, so the output equals the dense tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import GridsError
from .anchored import AnchoredSampler, AnchoredSamplerConfig, Float32MLP, linear32, norm32
from .anchors import Region
from .base import ReducerConfig, Sampled, in_float32
from .blocks import block_means, block_reach, patch_positions, spread
from .interpolation import antialiased, bilinear, tent
from .layout import TokenLayout

# What queries may depend on besides their anchors: the pooled instruction, the robot's state, the camera.
CONTEXTS = ("language", "state", "camera")
# Scores of a trained query are this much sharper than those of attention with the same weights.
SHARPNESS = 4.0
# Initial spread of the anchors' part of the queries.
ANCHOR_SPREAD = 0.5
# Log of a weight that is zero.
NEVER = -1e9


@ReducerConfig.register_subclass("grids")
@dataclass
class GridSamplerConfig(AnchoredSamplerConfig):
    """GridS: tokens read where queries find something in the feature map."""

    summary: ClassVar[str] = (
        "read at coordinates that it finds in the image (after GridS, "
        "[arXiv 2605.11817](https://arxiv.org/abs/2605.11817))"
    )

    contexts: ClassVar[tuple[str, ...]] = CONTEXTS

    condition_on: list[str] = field(
        default_factory=lambda: list(CONTEXTS),
        metadata={"help": f"What the queries depend on besides their anchors: any of {CONTEXTS}."},
    )
    reading_width: float = field(
        default=1.5, metadata={"help": "Half the width in cells of the area that a token is read from, at least 1."}
    )
    hidden_width: int = field(default=128, metadata={"help": "Hidden units of the queries."})
    value_rank: int = field(
        default=128, metadata={"help": "Rank of the projection of what the scores weight; 0 for none."}
    )
    geometry_width: int = field(default=128, metadata={"help": "Hidden units of the geometry embedding; 0 for none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reading_width < 1:
            raise GridsError(f"reading_width={self.reading_width}; give at least 1, the width of a cell")

    def build(self, layout: TokenLayout) -> "GridSampler":
        return GridSampler(
            layout.token_grid,
            layout.width,
            **self.arguments(layout),
            reading_width=self.reading_width,
            hidden_width=self.hidden_width,
            value_rank=self.value_rank,
            geometry_width=self.geometry_width,
        )


class GridSampler(AnchoredSampler):
    """Replace the h * w visual tokens of an image by k tokens, read where their queries find something.

    Args:
        token_grid: (H, W) of the feature maps.
        width: C, channels of a token.
        num_tokens: K, the initial budget.
        condition_on: Which of "language", "state", "camera" the queries depend on, besides their anchors.
        language_width: Channels of the pooled instruction, if `condition_on` has "language".
        state_width: Dimensions of the robot state, if `condition_on` has "state".
        num_cameras: Number of cameras that share this sampler.
        reading_width: Half the width in cells of the area that a token is read from, at least 1.
        hidden_width: Hidden units of the queries.
        value_rank: Rank of the projection of what the scores weight; 0 for none.
        geometry_width: Hidden units of the geometry embedding; 0 for none.
        **options: Further arguments of `AnchoredSampler`.

    Raises:
        BudgetError: If a budget is not within 1 .. H * W.
        ValueError: If `condition_on` names an unknown context.
    """

    def __init__(
        self,
        token_grid: tuple[int, int],
        width: int,
        num_tokens: int,
        *,
        condition_on: Sequence[str] = (),
        language_width: int = 0,
        state_width: int = 0,
        num_cameras: int = 1,
        reading_width: float = 1.5,
        hidden_width: int = 128,
        value_rank: int = 128,
        geometry_width: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(token_grid, num_tokens, **options)
        unknown = sorted(set(condition_on) - set(CONTEXTS))
        if unknown:
            raise ValueError(f"condition_on holds {unknown}; expected any of {list(CONTEXTS)}")
        self.width, self.num_cameras, self.reading_width = width, num_cameras, reading_width
        self.condition_on = tuple(name for name in CONTEXTS if name in condition_on)
        widths = {"language": language_width, "state": state_width, "camera": num_cameras}
        self.anchor_queries = nn.Parameter(torch.randn(self.num_tokens_max, hidden_width) * ANCHOR_SPREAD)
        self.inputs = nn.ModuleDict({name: nn.Linear(widths[name], hidden_width) for name in self.condition_on})
        self.language_norm = nn.LayerNorm(language_width) if "language" in self.condition_on else None
        self.query = nn.Linear(hidden_width, width, bias=False)
        nn.init.zeros_(self.query.weight)
        self.map_norm = nn.LayerNorm(width)
        self.value: nn.Module | None = None
        if value_rank > 0:
            self.value = LowRank(width, min(value_rank, width))
        self.geometry = Float32MLP(2, geometry_width, width) if geometry_width > 0 else None

    def reduce(self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region) -> Sampled:
        with in_float32(feature_map):
            cells = self.cells_of(region)[:k]
            order = self.raster_order(cells)
            image, corner = self.image_of(feature_map, region)
            reach = self.reach(image, k)
            if reach > 1:
                queries = self._queries(context, order)
                tokens, pixels = self._find(image, queries, cells[order] - corner, reach)
                pixels = pixels + corner
            else:
                # Each window holds its anchor alone.
                pixels = cells[order].float().expand(len(feature_map), -1, -1)
                tokens = bilinear(feature_map, patch_positions(pixels, self.block))
            coordinates = (pixels + 0.5) / self.grid_size
            if self.geometry is not None:
                tokens = tokens + spread(self.geometry(coordinates), self.block).to(tokens.dtype)
        return Sampled(tokens.to(feature_map.dtype), coordinates)

    def reads(self, k: int, camera: int = 0) -> tuple[float, float]:
        cells = block_reach(self._sharp(self.spacing(k, camera)), self.block)
        return cells, cells

    def _sharp(self, reach: float) -> float:
        """How far a token reads, in cells of the map, among tokens that are `reach` apart."""
        return max(1.0, min(reach, self.reading_width))

    def _queries(self, context: Mapping[str, Tensor], order: Tensor) -> Tensor:
        """Queries [b, k, c] of the tokens in this order; [1, k, c] if they depend on nothing but their anchors."""
        hidden = self.anchor_queries[order].float()[None]
        for name in self.condition_on:
            given = context[name]
            if name == "camera":
                given = given[:, None] == torch.arange(self.num_cameras, device=given.device)
            elif self.language_norm is not None and name == "language":
                given = norm32(self.language_norm, given)
            hidden = hidden + linear32(self.inputs[name], given)[:, None]  # type: ignore[arg-type]
        return linear32(self.query, nn.functional.gelu(hidden))

    def _find(self, image: Tensor, queries: Tensor, anchors: Tensor, reach: float) -> tuple[Tensor, Tensor]:
        """Read tokens float32 [b, k * block * block, c] at the cells [b, k, 2] that queries find around anchors."""
        cells = block_means(image, self.block)
        height, width = cells.shape[1:3]
        flat = cells.flatten(1, 2)
        axes = [torch.arange(count, device=flat.device, dtype=torch.float32) for count in (width, height)]
        places = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1).flatten(0, 1)
        window = _joined(tent(anchors[:, 0], width, reach), tent(anchors[:, 1], height, reach))
        prior = window.clamp_min(1e-30).log().masked_fill(window == 0, NEVER)
        scores = queries @ norm32(self.map_norm, flat).transpose(1, 2) * (SHARPNESS / math.sqrt(self.width))
        weights = (scores + prior).softmax(-1)
        # Both sides go through one function, so that a query of zero stays exactly at the anchor.
        moved = weights - (torch.zeros_like(scores) + prior).softmax(-1)
        pixels = anchors + (moved[..., None] * (places - anchors[:, None])).sum(2)
        pixels = torch.stack([pixels[..., 0].clamp(0, width - 1), pixels[..., 1].clamp(0, height - 1)], dim=-1)
        sharp = self._sharp(reach)
        read = _joined(tent(pixels[..., 0], width, sharp), tent(pixels[..., 1], height, sharp))
        if self.block == 1:
            tokens = read @ flat
        else:
            tokens = antialiased(image.float(), patch_positions(pixels, self.block), sharp)
        if self.value is not None:
            tokens = tokens + spread(self.value((weights - read) @ flat), self.block)
        return tokens, pixels


class LowRank(nn.Module):
    """A projection of low rank in float32, zero at first."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return linear32(self.up, linear32(self.down, x))


def _joined(columns: Tensor, rows: Tensor) -> Tensor:
    """Weights [..., k, h * w] of cells, from those along each axis, [..., k, w] and [..., k, h]."""
    return (rows[..., :, None] * columns[..., None, :]).flatten(-2)
