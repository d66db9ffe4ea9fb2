"""ACT: ResNet, sampler and encoder, up to the keys and values that the decoder reads; the decoder is the only step.

Until it first reads them the decoder is the same for all observations: computed once.
"""

from typing import Any, NamedTuple

import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from ...runtime import UnavailableError
from ...runtime.convolutions import without_norms
from ..position_embeddings import embeddings_of_tokens
from ..seam import Seam


class Seen(NamedTuple):
    """What the prefill gets.

    Attributes:
        images: float32 [n * b, 3, height, width], camera by camera.
        state: float32 [b, s], of the robot.
        environment: float32 [b, e], of what surrounds it; e is 0 where the policy does not read it.
    """

    images: Tensor
    state: Tensor
    environment: Tensor


class Memory(NamedTuple):
    """What the prefill leaves for the decoder.

    Attributes:
        keys_values: For each of its layers, keys and then values, [b, 2 * h, p, d].
    """

    keys_values: tuple[Tensor, ...]


class _Attention(nn.Module):
    """torch's attention with one product for queries and keys, fused scores, and the batch in front.

    Args:
        attention: torch's.

    Raises:
        UnavailableError: If its weights are not all that it does.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        plain = type(attention) is nn.MultiheadAttention and attention.in_proj_bias is not None
        if not plain or attention._forward_hooks or attention._forward_pre_hooks:
            raise UnavailableError(
                f"an attention is a {type(attention).__name__} or has hooks, and only torch's own is rewritten; merge "
                "low-rank matrices into the weights"
            )
        self.attention, self.heads = attention, attention.num_heads

    def project(self, tokens: Tensor, first: int, last: int) -> Tensor:
        """Queries (0), keys (1), values (2), from the first to the last of these, of [b, p, c]: [b, ... * h, p, d]."""
        attention, width = self.attention, self.attention.embed_dim
        rows = slice(first * width, (last + 1) * width)
        projected = F.linear(tokens, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
        return projected.unflatten(-1, ((last + 1 - first) * self.heads, -1)).transpose(1, 2)

    def keys_values(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[b, 2 * h, p, d]; positions belong to the keys."""
        return torch.cat([self.project(tokens + positions, 1, 1), self.project(tokens, 2, 2)], dim=1)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[b, h, t, d] to [b, t, c]."""
        attended = F.scaled_dot_product_attention(queries, keys, values)
        return F.linear(
            attended.transpose(1, 2).flatten(2), self.attention.out_proj.weight, self.attention.out_proj.bias
        )

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens [b, t, c] that attend to each other; positions belong to queries and keys."""
        queries, keys = self.project(tokens + positions, 0, 1).chunk(2, dim=1)
        return self.attend(queries, keys, self.project(tokens, 2, 2))


class _Encode(nn.Module):
    """A layer of the encoder."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.attention = layer, _Attention(layer.self_attn)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """[b, p, c], with positions [1 or b, p, c]."""
        layer = self.layer
        if layer.pre_norm:
            hidden = hidden + self.attention(layer.norm1(hidden), positions)
            return hidden + _feed_forward(layer, layer.norm2(hidden))
        hidden = layer.norm1(hidden + self.attention(hidden, positions))
        last: Tensor = layer.norm2(hidden + _feed_forward(layer, hidden))
        return last


def _feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    inner: Tensor = layer.linear2(layer.activation(layer.linear1(hidden)))
    return inner


# Of the prefill: see `runtime.Phases`.
VISION = ("backbone", "projection")


class Prefill(nn.Module):
    """ResNet, sampler, encoder, and the keys and values that the decoder reads.

    Args:
        model: LeRobot's.
        seam: Attached to its policy.
        cameras: Numbers of the cameras.
        dense: Positions float32 [1, c, H, W] of all cells.
        at_places: Whether a token has the position of where it was read, or of one of the first cells.
    """

    def __init__(self, model: Any, seam: Seam, cameras: list[int], dense: Tensor, at_places: bool) -> None:
        super().__init__()
        self.seam, self.cameras, self.reducer = seam, cameras, seam.reducer
        self.at_places = at_places
        self.backbone, self.projection = without_norms(model.backbone), model.encoder_img_feat_input_proj
        self.token_dtype = self.projection.weight.dtype
        self.state, self.norm = model.encoder_robot_state_input_proj, model.encoder.norm
        self.environment = model.encoder_env_state_input_proj if model.config.env_state_feature else None
        self.layers = nn.ModuleList([_Encode(layer) for layer in model.encoder.layers])
        self.readers = nn.ModuleList([_Attention(layer.multihead_attn) for layer in model.decoder.layers])
        self.latent: Tensor
        self.first: Tensor
        self.dense: Tensor
        # The latent is zero when it acts.
        self.register_buffer("latent", model.encoder_latent_input_proj.bias.detach().clone(), persistent=False)
        self.register_buffer("first", model.encoder_1d_feature_pos_embed.weight.detach().clone(), persistent=False)
        self.register_buffer("dense", dense, persistent=False)

    def forward(self, images: Tensor, state: Tensor, environment: Tensor) -> Memory:
        """See `runtime.phases`."""
        visual, coordinates = self.seam.reduce(
            self.reducer, images, {OBS_STATE: state}, self.cameras, self._encode, None
        )
        read_at = (coordinates or None) if self.at_places else None
        places = embeddings_of_tokens(self.dense, visual, read_at).transpose(0, 1)
        positions = torch.cat([self.first.expand(len(places), -1, -1), places.to(self.first.dtype)], dim=1)
        numbers = [self.latent.expand(len(state), -1), self.state(state)]
        if self.environment is not None:
            numbers.append(self.environment(environment))
        hidden = torch.cat([torch.stack(numbers, dim=1), *visual], dim=1)
        for layer in self.layers:
            hidden = layer(hidden, positions)
        hidden = self.norm(hidden)
        return Memory(tuple(reader.keys_values(hidden, positions) for reader in self.readers))  # type: ignore[operator]

    def _encode(self, images: Tensor) -> Tensor:
        cells: Tensor = self.projection(self.backbone(images.to(self.projection.weight.dtype))["feature_map"])
        return cells.flatten(2).transpose(1, 2).to(self.token_dtype)


class Decode(nn.Module):
    """The decoder: its queries are learned, so they are the same for all observations until they read the memory."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers, self.norm, self.head = model.decoder.layers, model.decoder.norm, model.action_head
        self.own: Any = nn.ModuleList([_Attention(layer.self_attn) for layer in self.layers])
        self.readers: Any = nn.ModuleList([_Attention(layer.multihead_attn) for layer in self.layers])
        self.positions: Tensor
        self.start: Tensor
        self.register_buffer("positions", model.decoder_pos_embed.weight.detach()[None].clone(), persistent=False)
        self.register_buffer("start", self._among_themselves(0, torch.zeros_like(self.positions)), persistent=False)

    def forward(self, memory: Memory, x_t: Tensor, step: Tensor) -> Tensor:
        """See `runtime.phases`."""
        hidden = self.start.expand(len(x_t), -1, -1)
        for number, (layer, reader) in enumerate(zip(self.layers, self.readers, strict=True)):
            if number:
                hidden = self._among_themselves(number, hidden)
            inner = layer.norm2(hidden) if layer.pre_norm else hidden
            queries = reader.project(inner + self.positions, 0, 0)
            hidden = hidden + reader.attend(queries, *memory.keys_values[number].chunk(2, dim=1))
            hidden = hidden if layer.pre_norm else layer.norm2(hidden)
            hidden = hidden + _feed_forward(layer, layer.norm3(hidden) if layer.pre_norm else hidden)
            hidden = hidden if layer.pre_norm else layer.norm3(hidden)
        actions: Tensor = self.head(self.norm(hidden))
        return actions

    def _among_themselves(self, number: int, hidden: Tensor) -> Tensor:
        """The first part of a layer, in which queries attend to each other."""
        layer = self.layers[number]
        if layer.pre_norm:
            return hidden + self.own[number](layer.norm1(hidden), self.positions)
        normed: Tensor = layer.norm1(hidden + self.own[number](hidden, self.positions))
        return normed


def decode_once(decode: Any, nothing: Tensor, numbers: Tensor) -> Tensor:
    """The loop: one step, which starts from nothing."""
    # On a GPU the next chunk overwrites what the step returns.
    actions: Tensor = decode(nothing, numbers[:1]).clone()
    return actions
