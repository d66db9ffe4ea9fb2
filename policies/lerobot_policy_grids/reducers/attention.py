"""Reducers inside the trunk: all visual tokens enter it, and k of them continue after its first layers.

FastV keeps the visual tokens that received most attention in the trunk's first layers. "An Image is Worth 1/2 Tokens
After Layer 2" (Chen et al., ECCV 2024, arXiv 2403.06764), section 4: a token's score is the attention it receives from
the tokens of the prompt (itself included), averaged over them and over heads, in the last layer before pruning. Kept
tokens keep their position ids. The only difference from the paper: the prefix of a VLA attends in both directions, so
every token of the prompt counts, not only those that follow the image.

SparseVLM keeps the visual tokens that relevant words attend to, and recycles the best of the rest. "SparseVLM: Visual
Token Sparsification for Efficient Vision-Language Model Inference" (Zhang et al., ICML 2025, arXiv 2410.04417),
section 3:
- Raters are the instruction's tokens whose similarity to the image is at least the mean over the instruction.
- A visual token's score is the attention it receives from the raters, averaged over them and over heads.
- The best of the tokens to be dropped are clustered by density peaks, and each cluster continues as one token.
Differences from the paper and its code:
- Raters are chosen by the hidden states at the pruning layer. The authors' code uses the embeddings that enter the
  trunk.
- There is one pruning step to a fixed budget K, and a quarter of the K tokens are recycled. The paper prunes at several
  layers, by the rank of the attention matrix, so K varies.
- A cluster's token is the mean of its members. Its position is that of the member at the cluster's centre.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .base import BudgetConfig, Reducer, ReducerConfig, in_float32
from .layout import TokenLayout, cell_coordinates, masked_mean, take

# Share of the budget for recycled tokens, and share of the dropped tokens that are recycled (the paper's tau).
RECYCLED, RECYCLABLE = 0.25, 0.3
# Number of neighbours in the estimate of a density.
NEIGHBOURS = 5


@dataclass
class TrunkConfig(BudgetConfig):
    """Base of the configurations of trunk reducers, which rank the tokens of all cameras together."""

    in_trunk: ClassVar[bool] = True

    full_layers: int | None = field(
        default=None,
        metadata={
            "help": "Layers of the trunk that see every token. Default: 2, or half of the layers if fewer than 4."
        },
    )


@ReducerConfig.register_subclass("fastv")
@dataclass
class FastVConfig(TrunkConfig):
    """FastV: pruning by the attention that tokens receive."""

    summary: ClassVar[str] = (
        "left after the trunk's first layers by attention (FastV, [arXiv 2403.06764](https://arxiv.org/abs/2403.06764))"
    )

    def build(self, layout: TokenLayout) -> "FastVReducer":
        return FastVReducer(layout.token_grid, **self.arguments(layout), layers=self.full_layers)


@ReducerConfig.register_subclass("sparsevlm")
@dataclass
class SparseVLMConfig(TrunkConfig):
    """SparseVLM: pruning by the attention from relevant words, with recycling."""

    summary: ClassVar[str] = (
        "left after the trunk's first layers by the instruction (SparseVLM, "
        "[arXiv 2410.04417](https://arxiv.org/abs/2410.04417))"
    )

    def build(self, layout: TokenLayout) -> "SparseVLMReducer":
        return SparseVLMReducer(layout.token_grid, **self.arguments(layout), layers=self.full_layers)


class Prefix(NamedTuple):
    """The prefix between two layers of the trunk: n visual tokens of all cameras and l instruction tokens.

    Attributes:
        visual: [b, n, c], hidden states of the visual tokens.
        text: [b, l, c], hidden states of the instruction tokens.
        text_mask: bool [b, l], false for padding.
        attention: float32 [b, p, n], attention from each of the p tokens of the prefix to each visual token in the
            layer before, averaged over heads; 0 from padding.
        text_attention: float32 [b, l, n], its rows of the instruction tokens.
    """

    visual: Tensor
    text: Tensor
    text_mask: Tensor
    attention: Tensor
    text_attention: Tensor


class Pruned(NamedTuple):
    """The visual tokens that continue in the trunk.

    Attributes:
        tokens: [b, k, c], hidden states.
        coordinates: float32 [b, k, 2], (x, y) in [0, 1] of their cells in their camera's image.
        places: int64 [b, k], ascending: index of the visual token whose position and mask each one has.
    """

    tokens: Tensor
    coordinates: Tensor
    places: Tensor


class TrunkReducer(Reducer):
    """Keep k visual tokens per camera after the trunk's first layers.

    Args:
        token_grid: (H, W) of one camera's feature map.
        num_tokens: K, the budget per camera.
        layers: Layers of the trunk that see every token; None lets the family choose.
        **options: Arguments of `Reducer`.
    """

    in_trunk = True

    def __init__(
        self, token_grid: tuple[int, int], num_tokens: int, *, layers: int | None = None, **options: Any
    ) -> None:
        super().__init__(token_grid, num_tokens, **options)
        self.layers = layers

    def choose(self, prefix: Prefix, k: int) -> tuple[Tensor, Tensor]:
        """Choose k tokens: their hidden states [b, k, c] and their index int64 [b, k], in any order."""
        raise NotImplementedError

    def forward(self, prefix: Prefix, cameras: int) -> Pruned:
        """Keep `num_tokens * cameras` visual tokens, ranked over all cameras together."""
        tokens, index = self.choose(prefix, self.num_tokens * cameras)
        order = index.argsort(dim=-1, stable=True)
        index = index.gather(1, order)
        cells = cell_coordinates(self.token_grid, index.device).repeat(cameras, 1)
        return Pruned(take(tokens, order), cells[index], index)

    def reads(self, k: int, camera: int = 0) -> tuple[float, float]:
        return 0.5, 0.5


def top(scores: Tensor, k: int) -> Tensor:
    """Index int64 [b, k] of the k largest scores [b, n]; in a tie the earlier token comes first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :k]


class FastVReducer(TrunkReducer):
    """Attention-ranked pruning after the first layers of the trunk."""

    def choose(self, prefix: Prefix, k: int) -> tuple[Tensor, Tensor]:
        index = top(prefix.attention.mean(1), k)
        return take(prefix.visual, index), index


def raters(prefix: Prefix) -> Tensor:
    """Which instruction tokens are raters: bool [b, l] (paper, "relevant text token selection")."""
    mask = prefix.text_mask
    with in_float32(prefix.visual):
        similarity = prefix.visual.float() @ prefix.text.float().transpose(1, 2)
    similarity = similarity.masked_fill(~mask[:, None], -torch.inf).softmax(-1).mean(1)
    average = (similarity * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
    # The tolerance keeps raters when all similarities are equal up to rounding.
    return mask & (similarity >= average - 1e-6)


def cluster(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Group tokens around density peaks (Rodriguez and Laio, 2014; k-nearest-neighbour densities).

    Args:
        tokens: [b, m, c].
        count: Number of clusters, at most m.

    Returns:
        (index of the tokens at the centres, int64 [b, count]; cluster of each token, int64 [b, m]).
    """
    distance = torch.cdist(tokens.float(), tokens.float()) / tokens.shape[-1] ** 0.5
    nearest = distance.topk(min(NEIGHBOURS, tokens.shape[1]), largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    denser = density[:, None] > density[..., None]
    furthest = distance.flatten(1).max(-1).values[:, None, None]
    isolation = torch.where(denser, distance, furthest).min(-1).values
    centres = top(density * isolation, count)
    to_centres = distance.gather(1, centres[..., None].expand(-1, -1, distance.shape[-1]))
    # A centre belongs to its own cluster, even if two centres coincide.
    to_centres.scatter_(2, centres[..., None], -1.0)
    return centres, to_centres.argmin(1)


class SparseVLMReducer(TrunkReducer):
    """Text-guided pruning with recycling after the first layers of the trunk."""

    def choose(self, prefix: Prefix, k: int) -> tuple[Tensor, Tensor]:
        n = prefix.visual.shape[1]
        scores = masked_mean(prefix.text_attention, raters(prefix))
        order = top(scores, n)
        recycled = min(int(RECYCLED * k), n - k)
        kept, rest = order[:, : k - recycled], order[:, k - recycled :]
        if recycled == 0:
            return take(prefix.visual, kept), kept
        rest = rest[:, : max(recycled, round(RECYCLABLE * rest.shape[1]))]
        members = take(prefix.visual, rest)
        with torch.no_grad():
            centres, cluster_of = cluster(members, recycled)
            share = torch.nn.functional.one_hot(cluster_of, recycled).to(members.dtype).transpose(1, 2)
            share = share / share.sum(-1, keepdim=True)
        tokens = torch.cat([take(prefix.visual, kept), share @ members], dim=1)
        return tokens, torch.cat([kept, rest.gather(1, centres)], dim=1)
