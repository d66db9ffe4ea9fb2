"""Dropping visual tokens between two layers of the trunk of π0 and π0.5, when they act.

Modifications, from outside, of `lerobot/policies/{pi0,pi05}` 0.6: hooks in front of each layer of the language model
and of the action expert shorten what they get. In training LeRobot runs both through a function of its own, which
nothing from outside reaches, so such a policy has no loss.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

from ..errors import UnsupportedPolicyError
from .seam import Seam
from .trunk import TrunkPruning, mean_attention, note_images


def attach(policy: Any, seam: Seam) -> None:
    """From now on the trunk of a π0 or π0.5 policy goes on with what `seam.prune` keeps."""
    trunk, expert = _layers(policy)
    pruning = TrunkPruning(seam, len(trunk))
    policy._preprocess_images = partial(note_images, pruning, policy._preprocess_images, 0, 0)
    policy.forward = partial(_refuse, policy.config.type)
    hooks = [
        layer.register_forward_pre_hook(partial(before, pruning, number), with_kwargs=True)
        for layers, before in ((trunk, _before_prefix), (expert, _before_suffix))
        for number, layer in enumerate(layers)
    ]
    policy._trunk_hooks = hooks


def detach(policy: Any) -> None:
    """Undo `attach`, but for `_preprocess_images`. Harmless when it was not done."""
    for hook in vars(policy).pop("_trunk_hooks", ()):
        hook.remove()
    vars(policy).pop("forward", None)


def _layers(policy: Any) -> tuple[nn.ModuleList, nn.ModuleList]:
    model = policy.model.paligemma_with_expert
    return model.paligemma.model.language_model.layers, model.gemma_expert.model.layers


def _refuse(kind: str, *args: Any, **kwargs: Any) -> None:
    raise UnsupportedPolicyError(
        f"tokens can be dropped inside the trunk of a '{kind}' policy only when it acts: LeRobot trains its layers in "
        "a function that cannot be reached; apply the reducer without training, eval --reducer fastv, or train another"
    )


def _before_prefix(pruning: TrunkPruning, number: int, layer: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """What a layer of the language model gets."""
    states = args[0]
    if number == 0:
        pruning.start()
    if number == pruning.layers - 1:
        pruning.observe(_attention(layer, states, kwargs["attention_mask"], kwargs["position_embeddings"]))
    if number == pruning.layers:
        states = pruning.prune(states)
    if pruning.shortened(number):
        kwargs["attention_mask"] = pruning.take(pruning.take(kwargs["attention_mask"], -1), -2)
        kwargs["position_ids"] = pruning.take(kwargs["position_ids"], 1)
        kwargs["position_embeddings"] = tuple(pruning.take(part, 1) for part in kwargs["position_embeddings"])
    return (states, *args[1:]), kwargs


def _before_suffix(pruning: TrunkPruning, number: int, layer: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """What a layer of the action expert gets."""
    if pruning.shortened(number):
        kwargs["attention_mask"] = pruning.take(kwargs["attention_mask"], -1)
    return args, kwargs


@torch.no_grad()
def _attention(layer: Any, states: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """As transformers' `eager_attention_forward` weighs, float32 [b, p, p]."""
    attention = layer.self_attn
    states, _ = layer.input_layernorm(states)
    states = states.to(attention.q_proj.weight.dtype)
    query, key = (
        project(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotation)
    return mean_attention(query, key, mask[:, 0] == 0, attention.scaling)
