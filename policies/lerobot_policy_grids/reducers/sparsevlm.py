"""SparseVLM: keep the visual tokens that the relevant words look at, and recycle the best of the rest.

"SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference" (Zhang et al., ICML 2025,
arXiv 2410.04417), section 3:
- Raters are the instruction's tokens whose similarity to the image is at least the mean over the instruction.
- A visual token's score is the attention it receives from the raters, averaged over them and over heads.
- Of the tokens that would be dropped, the best are clustered by density peaks, and each cluster lives on as one token.
Differs from the paper and its code:
- Raters are chosen by the hidden states at the pruning layer, where the authors' code takes the embeddings that enter
  the trunk.
- One pruning step to a fixed budget K, of which a quarter are recycled tokens. The paper prunes at several layers, by
  the rank of the attention matrix, so that K varies.
- A cluster's token is the mean of its members, in the place of the member at its centre.
"""

import torch
from torch import Tensor

from ..reducer import in_float32
from .cells import take
from .trunk import Prefix, TrunkReducer, masked_mean, top

# Share of the budget that recycled tokens take, and of the dropped tokens that are recycled (the paper's tau).
RECYCLED, RECYCLABLE = 0.25, 0.3
# Neighbours that a density is estimated from.
NEIGHBOURS = 5


def raters(prefix: Prefix) -> Tensor:
    """Which instruction tokens rate: bool [b, l] (paper, "relevant text token selection")."""
    mask = prefix.text_mask
    with in_float32(prefix.visual):
        similarity = prefix.visual.float() @ prefix.text.float().transpose(1, 2)
    similarity = similarity.masked_fill(~mask[:, None], -torch.inf).softmax(-1).mean(1)
    average = (similarity * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
    # Rounding must not leave a uniform instruction without raters.
    return mask & (similarity >= average - 1e-6)


def cluster(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Group tokens around density peaks (Rodriguez and Laio, 2014; k-nearest-neighbour densities).

    Args:
        tokens: [b, m, c].
        count: Clusters, at most m.

    Returns:
        (the tokens at the centres, int64 [b, count]; each token's cluster, int64 [b, m]).
    """
    distance = torch.cdist(tokens.float(), tokens.float()) / tokens.shape[-1] ** 0.5
    nearest = distance.topk(min(NEIGHBOURS, tokens.shape[1]), largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    denser = density[:, None] > density[..., None]
    furthest = distance.flatten(1).max(-1).values[:, None, None]
    isolation = torch.where(denser, distance, furthest).min(-1).values
    centres = top(density * isolation, count)
    to_centres = distance.gather(1, centres[..., None].expand(-1, -1, distance.shape[-1]))
    # A centre is its own, even where two centres coincide.
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
