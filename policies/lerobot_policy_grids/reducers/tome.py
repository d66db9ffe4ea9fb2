"""ToMe: average the most similar tokens until k are left, after Token Merging.

"Token Merging: Your ViT But Faster" (Bolya et al., ICLR 2023, arXiv 2210.09461): bipartite soft matching with
size-weighted averages. Differences from the paper:
- ToMe runs once on the vision tower's output, instead of on r tokens in every block of the tower. The paper's matching
  is repeated, and each round removes at most half of the tokens. This saves time in the trunk, not in the vision tower.
- Similarity is the cosine of the tokens themselves, because the output has no attention keys.
- There is no proportional attention: the trunk attends to an averaged token as to any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .anchors import Region
from .base import CameraBudgetConfig, MapReducer, ReducerConfig, Sampled, in_float32
from .layout import TokenLayout, cell_coordinates, take


@ReducerConfig.register_subclass("tome")
@dataclass
class ToMeConfig(CameraBudgetConfig):
    """Token Merging."""

    summary: ClassVar[str] = (
        "averages of similar tokens (Token Merging, [arXiv 2210.09461](https://arxiv.org/abs/2210.09461))"
    )

    def build(self, layout: TokenLayout) -> "ToMeReducer":
        return ToMeReducer(layout.token_grid, **self.arguments(layout))


def merge_most_similar(tokens: Tensor, sizes: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """One round of bipartite soft matching (paper, section 3).

    Tokens are split alternately into two sets. Each token of the first set gets an edge to the most similar token of
    the second, and the `count` strongest edges are contracted.

    Args:
        tokens: [b, n, c].
        sizes: [b, n, 1], number of dense tokens in each average.
        places: [b, n, 2], their mean coordinates.
        count: Edges to contract, at most n // 2.

    Returns:
        (tokens, sizes, places) with n - count rows.
    """
    with torch.no_grad():
        unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
        similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        strength, partner = similarity.max(-1)
        # A stable sort takes the earlier token in a tie; topk guarantees no order.
        order = strength.argsort(dim=-1, descending=True, stable=True)
        joined, kept = order[:, :count], order[:, count:].sort(-1).values
        target = partner.gather(1, joined)

    def contract(rows: Tensor) -> Tensor:
        first, second = rows[:, ::2], rows[:, 1::2]
        index = target[..., None].expand(-1, -1, rows.shape[-1])
        return torch.cat([take(first, kept), second.scatter_add(1, index, take(first, joined))], dim=1)

    total = contract(sizes)
    return contract(tokens * sizes) / total, total, contract(places * sizes) / total


class ToMeReducer(MapReducer):
    """Bipartite soft matching of the dense tokens down to k."""

    def reduce(self, feature_map: Tensor, context: Mapping[str, Tensor], k: int, region: Region) -> Sampled:
        tokens = feature_map.flatten(1, 2).float()
        sizes = tokens.new_ones(*tokens.shape[:2], 1)
        places = cell_coordinates(self.token_grid, tokens.device).expand(len(tokens), -1, -1)
        with in_float32(tokens):
            while (left := tokens.shape[1]) > k:
                tokens, sizes, places = merge_most_similar(tokens, sizes, places, min(left // 2, left - k))
        height, width = self.token_grid
        raster = (places[..., 1] * height).floor() * width + places[..., 0] * width
        order = raster.argsort(dim=-1, stable=True)
        return Sampled(take(tokens, order).to(feature_map.dtype), take(places, order))
