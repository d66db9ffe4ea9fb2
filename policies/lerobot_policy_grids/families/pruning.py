"""Dropping visual tokens between two layers of a trunk: what every family's trunk has in common."""

from typing import Any

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

from ..errors import BudgetError
from ..reducers.attention import Prefix
from ..reducers.base import in_float32
from ..reducers.layout import take
from .seam import Seam

# Layers that see every token (FastV's K = 2), as long as as many follow.
FULL_LAYERS = 2


class TrunkPruning:
    """What is left of the prefix that runs through the trunk at the moment.

    Args:
        seam: Chooses what is kept.
        num_layers: Layers of the trunk.

    Raises:
        BudgetError: If the trunk has no layer left to save.

    Attributes:
        layers: How many layers see every token.
    """

    def __init__(self, seam: Seam, num_layers: int) -> None:
        self.seam = seam
        asked = seam.full_layers
        self.layers = max(1, min(FULL_LAYERS, num_layers // 2)) if asked is None else asked
        if not 1 <= self.layers < num_layers:
            raise BudgetError(
                f"full_layers={self.layers}, but the trunk has {num_layers} layers; choose 1 .. {num_layers - 1}"
            )
        self._cameras = 0
        self._visual: list[int] = []
        self._text: list[int] = []
        self._text_mask: Tensor | None = None
        self._attention: Tensor | None = None
        self._kept: Tensor | None = None
        self._length = 0

    def begin(self, counts: list[int], batch: dict[str, Tensor], before: int = 0, after: int = 0) -> None:
        """Note where in the prefix the visual tokens and the instruction will be.

        Args:
            counts: Visual tokens of each camera, which come first.
            batch: The policy's batch.
            before: Special tokens in front of each camera's.
            after: Special tokens behind each camera's.
        """
        self._cameras = len(counts)
        self._visual, end = [], 0
        for count in counts:
            self._visual += range(end + before, end + before + count)
            end += before + count + after
        self._text = list(range(end, end + batch[OBS_LANGUAGE_TOKENS].shape[1]))
        self._text_mask = batch[OBS_LANGUAGE_ATTENTION_MASK].bool()

    def start(self) -> None:
        """A prefix enters the trunk."""
        self._kept = None

    def observe(self, weights: Tensor) -> None:
        """Attention of the last layer that sees everything: float32 [b, p, p], averaged over heads."""
        self._attention = weights

    def shortened(self, layer: int) -> bool:
        """Whether a layer, by number, gets less than the whole prefix."""
        return self._kept is not None and layer >= self.layers

    @property
    def kept_length(self) -> int:
        """Tokens of the prefix that are left."""
        assert self._kept is not None
        return self._kept.shape[1]

    def prune(self, prefix: Tensor) -> Tensor:
        """What is left of hidden states [b, p, c], in the order of the prefix."""
        weights, text_mask = self._attention, self._text_mask
        assert weights is not None
        assert text_mask is not None
        self._attention = None
        self._length = prefix.shape[1]
        visual = torch.tensor(self._visual, device=prefix.device)
        text = torch.tensor(self._text, device=prefix.device)
        weights = weights[..., visual]
        pruned = self.seam.prune(
            Prefix(prefix[:, visual], prefix[:, text], text_mask, weights, weights[:, text]), self._cameras
        )
        if pruned is None:
            return prefix
        # By numbers, not by a mask: the meta device, on which costs are counted, has no values.
        others = torch.tensor(sorted(set(range(self._length)) - set(self._visual)), device=prefix.device)
        index = torch.cat([visual[pruned.places], others.expand(len(prefix), -1)], dim=1)
        states = torch.cat([pruned.tokens.to(prefix.dtype), prefix[:, others]], dim=1)
        order = index.argsort(dim=-1)
        self._kept = index.gather(1, order)
        return take(states, order)

    def take(self, values: Tensor, dim: int) -> Tensor:
        """Entries of what is left of the prefix, and of whatever follows it, along a dimension of [b, ...]."""
        assert self._kept is not None
        dim %= values.ndim
        rest = torch.arange(self._length, values.shape[dim], device=values.device).expand(len(self._kept), -1)
        index = torch.cat([self._kept, rest], dim=1)
        # A mask may serve the whole batch.
        shape = [len(index), *values.shape[1:]]
        shape[dim] = index.shape[1]
        aligned = index.view([len(index) if d == 0 else index.shape[1] if d == dim else 1 for d in range(values.ndim)])
        return values.expand(len(index), *values.shape[1:]).gather(dim, aligned.expand(shape))


def mean_attention(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """What each token gives each other, averaged over heads.

    Args:
        query: [b, heads, p, d], rotated.
        key: [b, key heads, p, d], rotated.
        visible: bool [b, p, p].
        scale: Factor on the products of queries and keys.

    Returns:
        float32 [b, p, p]; rows of padding are 0.
    """
    query, key = query.float(), key.float()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    with in_float32(query):
        scores = query @ key.transpose(2, 3) * scale
    weights = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min).softmax(-1).mean(1)
    return weights * visible.diagonal(dim1=1, dim2=2)[..., None]


def note_images(pruning: TrunkPruning, prepare: Any, before: int, after: int, batch: dict[str, Tensor]) -> Any:
    """Call a policy's preparation of images, and note what of them will be in the prefix."""
    tokens, masks = prepare(batch)
    pruning.begin([camera.shape[1] for camera in tokens], batch, before, after)
    return tokens, masks
