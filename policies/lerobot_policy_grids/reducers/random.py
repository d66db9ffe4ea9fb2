"""Random: keep k of the dense tokens, drawn anew for every image. A baseline for methods that choose tokens.

The draws depend on torch's random state but do not advance it, so the policy's noise is the same with every reducer,
and a student and its teacher get the same noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .anchors import Region
from .base import CameraBudgetConfig, MapReducer, ReducerConfig, Sampled
from .layout import TokenLayout, cell_coordinates, take


@ReducerConfig.register_subclass("random")
@dataclass
class RandomConfig(CameraBudgetConfig):
    """Draws random tokens for every image."""

    summary: ClassVar[str] = "drawn at random for every image"

    def build(self, layout: TokenLayout) -> "RandomReducer":
        return RandomReducer(layout.token_grid, **self.arguments(layout))


class RandomReducer(MapReducer):
    """A random subset of the dense tokens.

    Args:
        token_grid: (H, W) of the feature maps.
        num_tokens: K, the initial budget.
        **options: Further arguments of `MapReducer`. Cells of letterbox padding are drawn only when all others are.
    """

    def __init__(self, token_grid: tuple[int, int], num_tokens: int, **options: Any) -> None:
        super().__init__(token_grid, num_tokens, **options)
        self._looks = 0

    def _draw(self, dense: Tensor) -> Tensor:
        if dense.is_meta:
            return dense.new_empty(dense.shape[:2], dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            seed = int(torch.randint(2**31, ()))
        if not self.training:
            # Inference may draw no noise, so the random state stays the same; the counter makes each draw different.
            self._looks += 1
            seed += self._looks
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(dense.shape[:2], generator=generator).to(dense.device)

    def reduce(self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region) -> Sampled:
        dense = feature_map.flatten(1, 2)
        places = cell_coordinates(self.token_grid, dense.device)
        left, top, right, bottom = region
        x, y = places.unbind(-1)
        padding = (x < left) | (x > right) | (y < top) | (y > bottom)
        kept = (self._draw(dense) + padding.float()).topk(k, largest=False).indices.sort(-1).values
        places = places.expand(len(dense), -1, -1)
        return Sampled(take(dense, kept), take(places, kept))

    def reads(self, k: int, camera: int = 0) -> tuple[float, float]:
        return 0.5, 0.5
