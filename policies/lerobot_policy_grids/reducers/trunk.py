"""Reducers inside the trunk: all visual tokens enter it, and k of them go on after its first layers."""

from typing import Any, NamedTuple

from torch import Tensor

from ..reducer import Reducer
from .cells import cell_coordinates


class Prefix(NamedTuple):
    """The prefix between two layers of the trunk, n visual tokens of all cameras, l instruction tokens.

    Attributes:
        visual: [b, n, c], hidden states.
        text: [b, l, c].
        text_mask: bool [b, l], false for padding.
        attention: float32 [b, p, n], what each of the p tokens of the prefix gave each visual token in the layer
            before, averaged over heads; 0 from padding.
        text_attention: float32 [b, l, n], the part of it that the instruction gave.
    """

    visual: Tensor
    text: Tensor
    text_mask: Tensor
    attention: Tensor
    text_attention: Tensor


class Pruned(NamedTuple):
    """What goes on into the trunk.

    Attributes:
        tokens: [b, k, c], hidden states.
        coordinates: float32 [b, k, 2], where they came from in their camera's image.
        places: int64 [b, k], ascending: the visual tokens whose positions and masks they have.
    """

    tokens: Tensor
    coordinates: Tensor
    places: Tensor


class TrunkReducer(Reducer):
    """Keep k visual tokens per camera after the trunk's first layers.

    Args:
        token_grid: (H, W) of one camera's feature map.
        num_tokens: K.
        layers: Layers of the trunk that see every token; None lets the adapter choose.
        **options: As of `Reducer`.
    """

    in_trunk = True

    def __init__(
        self, token_grid: tuple[int, int], num_tokens: int, *, layers: int | None = None, **options: Any
    ) -> None:
        super().__init__(token_grid, num_tokens, **options)
        self.layers = layers

    def choose(self, prefix: Prefix, k: int) -> tuple[Tensor, Tensor]:
        """What to keep: hidden states [b, k, c] and their index int64 [b, k], in any order."""
        raise NotImplementedError

    def forward(self, prefix: Prefix, cameras: int) -> Pruned:
        """Keep `num_tokens` visual tokens times the cameras, ranked over all cameras together."""
        tokens, index = self.choose(prefix, self.num_tokens * cameras)
        order = index.argsort(dim=-1, stable=True)
        index = index.gather(1, order)
        tokens = tokens.gather(1, order[..., None].expand_as(tokens))
        cells = cell_coordinates(self.token_grid, index.device).repeat(cameras, 1)
        return Pruned(tokens, cells[index], index)


def top(scores: Tensor, k: int) -> Tensor:
    """Index int64 [b, k] of the largest scores [b, n]; on a tie the earlier token."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :k]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over dim 1 of [b, m, n] where mask bool [b, m] is true."""
    weights = mask.float()[..., None]
    return (values * weights).sum(1) / weights.sum(1).clamp_min(1)
