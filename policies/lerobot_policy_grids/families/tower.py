"""Sampling between two layers of a vision tower: the layers behind it, and the last norm, run on the tokens alone.

A tower is a list of layers that map states [b, n, c] to states of the same shape, wherever they come from. So nothing
else in it has to know how many there are: positions are part of the states from the embeddings on.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedPolicyError
from ..reducers import TokenLayout
from .seam import Sampling, Seam


@dataclass(frozen=True)
class Tower:
    """The layers of a vision tower.

    Attributes:
        encoder: Its `forward` takes inputs_embeds [b, n, c] and attention_mask by name, and runs its `layers`.
        width: C, channels of the states.
        block: The connector behind it merges block x block patches into one token.
    """

    encoder: Any
    width: int
    block: int = 1

    def layout(self, tokens: TokenLayout, after: int) -> TokenLayout:
        """The map that is sampled after some layers, in a policy with these visual tokens.

        Raises:
            UnsupportedPolicyError: If the tower has fewer layers.
        """
        count = len(self.encoder.layers)
        if after > count:
            raise UnsupportedPolicyError(
                f"sample_after_layer={after}, but the vision tower has {count} layers; choose 0 .. {count}, or drop it"
            )
        return replace(tokens, width=self.width, block=self.block)


def sample_between(encoder: nn.Module, seam: Seam, after: int) -> None:
    """From now on an encoder goes on, after some layers, with what `seam.between` makes of its states."""
    seam.after = after
    encoder.forward = partial(_forward, encoder, seam)


def release_tower(encoder: nn.Module) -> None:
    """Undo `sample_between`. Harmless when it was not done."""
    vars(encoder).pop("forward", None)


def _forward(encoder: Any, seam: Seam, inputs_embeds: Tensor, attention_mask: Any = None, **kw: Any) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    sample = seam.between
    if sample is None:
        return type(encoder).forward(encoder, inputs_embeds, attention_mask, **kw)
    states = run_between(encoder, seam.after, sample, inputs_embeds, attention_mask, **kw)
    return BaseModelOutput(last_hidden_state=states)


def run_between(
    encoder: Any, after: int, sample: Sampling, states: Tensor, attention_mask: Tensor | None = None, **kw: Any
) -> Tensor:
    """What the layers of a tower make of states [n, t, c], sampled after some of them: [n, k, c]."""
    for layer in encoder.layers[:after]:
        states = layer(states, attention_mask, **kw)
    states = sample(states)
    if attention_mask is not None:
        # Every patch of an image is seen, so any part of the mask is the mask of any patches.
        attention_mask = attention_mask[..., : states.shape[1], : states.shape[1]]
    for layer in encoder.layers[after:]:
        states = layer(states, attention_mask, **kw)
    return states
