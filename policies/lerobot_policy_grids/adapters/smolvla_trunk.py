"""Dropping visual tokens between two layers of SmolVLA's trunk.

Modifications, from outside, of `lerobot/policies/smolvla` 0.6:
- `SmolVLMWithExpertModel.forward_attn_layer` and `forward_cross_attn_layer` get the prefix that is left, and its rows
  and columns of positions and masks. `forward` loops over the list of hidden states that it hands them, so what is put
  in that list is what goes on.
- Kept tokens keep their position ids; the key-value cache of later layers holds only them.
"""

from functools import partial
from typing import Any

import torch
from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope
from torch import Tensor

from .seam import Seam
from .trunk import TrunkPruning, mean_attention, note_images

LAYERS = ("forward_attn_layer", "forward_cross_attn_layer")


def attach(policy: Any, seam: Seam, before: int, after: int) -> None:
    """From now on the trunk of a SmolVLA policy goes on with what `seam.prune` keeps."""
    vlm = policy.model.vlm_with_expert
    pruning = TrunkPruning(seam, vlm.num_vlm_layers)
    policy.prepare_images = partial(note_images, pruning, policy.prepare_images, before, after)
    for name in LAYERS:
        setattr(vlm, name, partial(_run_layer, pruning, partial(getattr(type(vlm), name), vlm)))


def detach(policy: Any) -> None:
    """Undo `attach`, but for `prepare_images`. Harmless when it was not done."""
    for name in LAYERS:
        vars(policy.model.vlm_with_expert).pop(name, None)


def _run_layer(
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
    prefix = inputs_embeds[0]
    if prefix is not None:
        if layer_idx == 0:
            pruning.start()
        if layer_idx == pruning.layers - 1:
            pruning.observe(_attention(model_layers[0][layer_idx], prefix, position_ids, attention_mask, head_dim))
        if layer_idx == pruning.layers:
            inputs_embeds[0] = pruning.prune(prefix)
    shortened = pruning.shortened(layer_idx)
    if shortened:
        attention_mask = pruning.take(attention_mask, -1)
        if prefix is not None:
            attention_mask = pruning.take(attention_mask, 1)
            position_ids = pruning.take(position_ids, 1)
    result = run(
        model_layers,
        inputs_embeds,
        layer_idx,
        position_ids,
        attention_mask,
        batch_size,
        head_dim,
        use_cache=use_cache,
        past_key_values=past_key_values,
    )
    if shortened and prefix is None and past_key_values is not None:
        # LeRobot takes the suffix out of the cache by cropping to the length of the whole prefix.
        past_key_values.layers[layer_idx].crop(pruning.kept_length)
    return result


@torch.no_grad()
def _attention(layer: Any, prefix: Tensor, positions: Tensor, mask: Tensor, head_dim: int) -> Tensor:
    """As `SmolVLMWithExpertModel.eager_attention_forward` weighs, float32 [b, p, p]."""
    size, length, _ = prefix.shape
    states = layer.input_layernorm(prefix).to(layer.self_attn.q_proj.weight.dtype)
    query, key = (
        apply_rope(project(states).view(size, length, -1, head_dim), positions[:, :length]).transpose(1, 2)
        for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    return mean_attention(query, key, mask[:, :length, :length], head_dim**-0.5)
