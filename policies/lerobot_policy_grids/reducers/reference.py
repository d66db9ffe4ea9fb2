"""ReferenceSampler: the sampler of the published GridS weights, as they were trained, so that they can be imported.

After "GridS: Differentiable Grid Sampler" (Feng et al., ICML 2026, arXiv 2605.11817): the mean of the feature map goes
through an MLP and a sigmoid to K coordinates c in [0, 1]^2, the map is read there between four cells, and an MLP of the
coordinates is added. Names and shapes of the weights are those of the published checkpoints. For training anew there
are `grid_sampler` and `mean_sampler`.

The published trees read the map in two ways, and weights of one do not work in the other:
- "lerobot": c = 0 and c = 1 are the outer borders of the map, so cell i of n is at (i + 0.5) / n. Outside is
  zero: within half a cell of the border a token fades, to a half at the border and to a quarter in a corner.
- "openpi": c = 0 and c = 1 are the centres of the first and the last cell, at i / (n - 1). No coordinate
  lies outside. The paper's separate example in PyTorch differs from openpi in one point: it returns zero at c = 1.

Differs from the published code: arithmetic is float32 in every model, so that no coordinate is rounded to 1. Maps that
are not square are refused, which one tree does too, and another squeezes to a square.

Both trees sample the map behind the projector, as wide as the trunk, and add the embedding of the coordinates there. So
does this reducer (`projected`): a projector that widens does not reach every direction of the trunk, so that sum cannot
be moved in front of it.

Differs from the other reducers: K is the width of the last layer and cannot change. Tokens come in the order of that
layer, not in raster order. At K = H * W the tokens are not the dense ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BudgetError, GridsError, TokenGridError
from .anchored import linear32
from .anchors import Region
from .base import BudgetConfig, MapReducer, ReducerConfig, Sampled, in_float32
from .layout import TokenLayout

# Convention -> options of `F.grid_sample`.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "lerobot": {"align_corners": False, "padding_mode": "zeros"},
    "openpi": {"align_corners": True, "padding_mode": "border"},
}


@ReducerConfig.register_subclass("reference")
@dataclass
class ReferenceConfig(BudgetConfig):
    """The sampler of the published GridS weights, for `lerobot-grids import-reference`."""

    summary: ClassVar[str] = (
        "read at coordinates predicted from the image's mean features, by published weights (GridS, "
        "[arXiv 2605.11817](https://arxiv.org/abs/2605.11817))"
    )
    dense_at_all_tokens: ClassVar[bool] = False
    projected: ClassVar[bool] = True

    convention: str = field(
        default="lerobot", metadata={"help": f"Where coordinates are on the map: one of {', '.join(CONVENTIONS)}."}
    )
    hidden_width: int = field(default=512, metadata={"help": "Hidden units of the coordinate head."})
    geometry_width: int = field(default=256, metadata={"help": "Hidden units of the geometry embedding; 0 for none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_tokens_max not in (None, self.num_tokens):
            raise BudgetError(
                f"num_tokens={self.num_tokens} with num_tokens_max={self.num_tokens_max}; reducer 'reference' has one "
                "K, so drop num_tokens_max"
            )
        if self.convention not in CONVENTIONS:
            raise GridsError(f"convention '{self.convention}' is unknown; choose one of {', '.join(CONVENTIONS)}")

    def build(self, layout: TokenLayout) -> "ReferenceSampler":
        return ReferenceSampler(
            layout.token_grid,
            layout.width,
            **self.arguments(layout),
            convention=self.convention,
            hidden_width=self.hidden_width,
            geometry_width=self.geometry_width,
        )


class ReferenceSampler(MapReducer):
    """Replace the n * n visual tokens of an image by K, as the published GridS code does.

    Args:
        token_grid: (n, n) of the feature maps.
        width: C, channels of a token.
        num_tokens: K.
        convention: "lerobot" or "openpi".
        hidden_width: Hidden units of the coordinate head.
        geometry_width: Hidden units of the geometry embedding; 0 for none.
        **options: Further arguments of `MapReducer`.

    Raises:
        BudgetError: If K is not within 1 .. n * n.
        TokenGridError: If the maps are not square.
    """

    def __init__(
        self,
        token_grid: tuple[int, int],
        width: int,
        num_tokens: int,
        *,
        convention: str = "lerobot",
        hidden_width: int = 512,
        geometry_width: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(token_grid, num_tokens, **options)
        if len(set(self.token_grid)) > 1:
            raise TokenGridError(
                f"reducer 'reference' was published for square maps, and this policy's is {self.token_grid[0]} x "
                f"{self.token_grid[1]}; choose reducer mean or grids"
            )
        self.width, self.convention = width, convention
        # Sequential, for the names of the published weights.
        self.scout_mlp = _mlp(width, hidden_width, 2 * self.num_tokens_max)
        self.coord_encoder = _mlp(2, geometry_width, width) if geometry_width > 0 else None

    def check_budget(self, num_tokens: int) -> None:
        if num_tokens != self.num_tokens_max:
            raise BudgetError(
                f"num_tokens={num_tokens}, but these published weights predict {self.num_tokens_max} coordinates; drop "
                "it, or train reducer mean or grids"
            )

    def reads(self, k: int, camera: int = 0) -> tuple[float, float]:
        return 1.0, 1.0

    def reduce(self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region) -> Sampled:
        with in_float32(feature_map):
            values = feature_map.float()
            points = _run(self.scout_mlp, values.mean(dim=(1, 2))).sigmoid().unflatten(-1, (-1, 2))
            read = nn.functional.grid_sample(
                values.permute(0, 3, 1, 2), 2 * points[:, None] - 1, **CONVENTIONS[self.convention]
            )
            tokens = read[:, :, 0].transpose(1, 2)
            if self.coord_encoder is not None:
                tokens = tokens + _run(self.coord_encoder, points)
            if self.convention == "openpi":
                cells = self.token_grid[0]
                points = (points * (cells - 1) + 0.5) / cells
        return Sampled(tokens.to(feature_map.dtype), points)


def _mlp(width_in: int, width_hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width_hidden), nn.ReLU(), nn.Linear(width_hidden, width_out))


def _run(mlp: nn.Sequential, x: Tensor) -> Tensor:
    """In float32, whatever the weights are."""
    first, _, last = mlp
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    return linear32(last, torch.relu(linear32(first, x)))
