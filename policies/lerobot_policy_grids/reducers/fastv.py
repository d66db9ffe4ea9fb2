"""FastV: keep the visual tokens that received most attention in the trunk's first layers.

"An Image is Worth 1/2 Tokens After Layer 2" (Chen et al., ECCV 2024, arXiv 2403.06764), section 4: a token's score is
the attention it receives from the tokens of the prompt (itself included), averaged over them and over heads, in the
last layer before pruning. Kept tokens keep their position ids. Differs from the paper only in the trunk it sits in: a
VLA's prefix attends in both directions, so every token is asked, not only those that follow the image.
"""

from torch import Tensor

from .cells import take
from .trunk import Prefix, TrunkReducer, top


class FastVReducer(TrunkReducer):
    """Attention-ranked pruning after the first layers of the trunk."""

    def choose(self, prefix: Prefix, k: int) -> tuple[Tensor, Tensor]:
        index = top(prefix.attention.mean(1), k)
        return take(prefix.visual, index), index
