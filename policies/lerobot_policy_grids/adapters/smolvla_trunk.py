"""Dropping visual tokens between two layers of SmolVLA's trunk.

Modifications, from outside, of `lerobot/policies/smolvla` 0.6:
- `SmolVLMWithExpertModel.forward_attn_layer` and `forward_cross_attn_layer` get the prefix that is left, and its rows
  and columns of positions and masks. `forward` loops over the list of hidden states that it hands them, so what is put
  in that list is what goes on.
- Kept tokens keep their position ids; the key-value cache of later layers holds only them.
"""

from typing import Any

import torch
from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

from ..errors import BudgetError
from ..reducers.trunk import Prefix
from .seam import Seam

# Layers that see every token (FastV's K = 2), as long as as many follow.
FULL_LAYERS = 2


class TrunkPruning:
    """What is known of the prefix that runs through the trunk at the moment.

    Args:
        policy: A SmolVLA policy.
        seam: Chooses what is kept.

    Raises:
        BudgetError: If the trunk has no layer left to save.
    """

    def __init__(self, policy: Any, seam: Seam) -> None:
        self.seam = seam
        count = policy.model.vlm_with_expert.num_vlm_layers
        asked = seam.full_layers
        self.layers = max(1, min(FULL_LAYERS, count // 2)) if asked is None else asked
        if not 1 <= self.layers < count:
            raise BudgetError(f"full_layers={self.layers}, but the trunk has {count} layers; choose 1 .. {count - 1}")
        self.cameras = 0
        self.visual: list[int] = []
        self.text: list[int] = []
        self.text_mask: Tensor | None = None
        self._attention: Tensor | None = None
        self._kept: Tensor | None = None

    def begin(self, policy: Any, tokens: list[Tensor], batch: dict[str, Tensor]) -> None:
        """Note where in the prefix `embed_prefix` will put the visual tokens of each camera, and the instruction."""
        from .smolvla import special_tokens  # which imports this module on use

        before, after = special_tokens(policy)
        self.cameras = len(tokens)
        self.visual, end = [], 0
        for image in tokens:
            start = end + before
            self.visual += range(start, start + image.shape[1])
            end = start + image.shape[1] + after
        self.text = list(range(end, end + batch[OBS_LANGUAGE_TOKENS].shape[1]))
        self.text_mask = batch[OBS_LANGUAGE_ATTENTION_MASK].bool()

    def enter(
        self, layers: Any, index: int, states: list[Tensor | None], positions: Tensor, mask: Tensor, head_dim: int
    ) -> tuple[Tensor, Tensor]:
        """What a layer gets, before it runs.

        Args:
            layers: The trunk's layers.
            index: Of the layer.
            states: [prefix [b, p, c] or None, suffix [b, s, c] or None]; the prefix is replaced by what is left of it.
            positions: int64 [b, p + s], or of the suffix alone.
            mask: bool [b, p + s, p + s], or [b, s, p + s].
            head_dim: Channels of an attention head.

        Returns:
            (positions, mask) of what is left.
        """
        prefix = states[0]
        if prefix is not None:
            if index == 0:
                self._kept = None
            if index == self.layers - 1:
                self._attention = attention(layers[index], prefix, positions, mask, head_dim)
            if index == self.layers:
                states[0] = self._prune(prefix)
        if self._kept is None or index < self.layers:
            return positions, mask
        kept = self._kept
        if prefix is None:
            return positions, self._columns(mask, kept)
        rest = torch.arange(self.length, positions.shape[1], device=kept.device).expand(len(kept), -1)
        rows = torch.cat([kept, rest], dim=1)
        mask = mask.gather(1, rows[..., None].expand(-1, -1, mask.shape[-1]))
        return positions.gather(1, rows), self._columns(mask, kept)

    def leave(self, index: int, cache: Any, prefix: Tensor | None) -> None:
        """Take the suffix out of a later layer's cache: LeRobot crops it to the length of the whole prefix."""
        if prefix is None and cache is not None and self._kept is not None and index >= self.layers:
            cache.layers[index].crop(self._kept.shape[1])

    def _columns(self, mask: Tensor, kept: Tensor) -> Tensor:
        """Columns of the prefix that are kept, and those of the suffix."""
        columns = kept[:, None].expand(-1, mask.shape[1], -1)
        return torch.cat([mask.gather(2, columns), mask[:, :, self.length :]], dim=2)

    def _prune(self, prefix: Tensor) -> Tensor:
        weights, text_mask = self._attention, self.text_mask
        self._attention = None
        if weights is None or text_mask is None:
            raise RuntimeError("the trunk ran without a prefix that was prepared")
        visual = torch.tensor(self.visual, device=prefix.device)
        text = torch.tensor(self.text, device=prefix.device)
        weights = weights[..., visual]
        pruned = self.seam.prune(
            Prefix(prefix[:, visual], prefix[:, text], text_mask, weights, weights[:, text]), self.cameras
        )
        if pruned is None:
            return prefix
        self.length = prefix.shape[1]
        others = torch.ones(self.length, dtype=torch.bool, device=prefix.device)
        others[visual] = False
        rest = others.nonzero().flatten().expand(len(prefix), -1)
        index = torch.cat([visual[pruned.places], rest], dim=1)
        states = torch.cat([pruned.tokens.to(prefix.dtype), prefix[:, others]], dim=1)
        # In the order of the prefix, with which suffix and cache go on.
        order = index.argsort(dim=-1)
        self._kept = index.gather(1, order)
        return states.gather(1, order[..., None].expand_as(states))


@torch.no_grad()
def attention(layer: Any, prefix: Tensor, positions: Tensor, mask: Tensor, head_dim: int) -> Tensor:
    """What each token of the prefix gives each other in a layer, averaged over heads: float32 [b, p, p].

    As `SmolVLMWithExpertModel.eager_attention_forward` computes it; rows of padding are 0.
    """
    size, length, _ = prefix.shape
    states = layer.input_layernorm(prefix).to(layer.self_attn.q_proj.weight.dtype)
    query, key = (
        apply_rope(project(states).view(size, length, -1, head_dim), positions[:, :length]).float().transpose(1, 2)
        for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * head_dim**-0.5
    mask = mask[:, :length, :length]
    weights = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min).softmax(-1).mean(1)
    real = mask.diagonal(dim1=1, dim2=2)
    return weights * real[..., None]


def prepare_images(policy: Any, pruning: TrunkPruning, prepare: Any, batch: dict[str, Tensor]) -> Any:
    """`prepare_images` of a policy whose trunk drops tokens."""
    tokens, masks = prepare(batch)
    pruning.begin(policy, tokens, batch)
    return tokens, masks


def run_layer(
    pruning: TrunkPruning,
    run: Any,
    model_layers: list[Any],
    inputs_embeds: list[Tensor | None],
    layer_idx: int,
    position_ids: Tensor,
    attention_mask: Tensor,
    batch_size: int,
    head_dim: int,
    use_cache: bool = True,
    past_key_values: Any = None,
) -> Any:
    """`forward_attn_layer` or `forward_cross_attn_layer` on what is left of the prefix."""
    positions, mask = pruning.enter(model_layers[0], layer_idx, inputs_embeds, position_ids, attention_mask, head_dim)
    result = run(
        model_layers,
        inputs_embeds,
        layer_idx,
        positions,
        mask,
        batch_size,
        head_dim,
        use_cache=use_cache,
        past_key_values=past_key_values,
    )
    pruning.leave(layer_idx, past_key_values, inputs_embeds[0])
    return result
