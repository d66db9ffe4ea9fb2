"""A decoder layer of the trunk or the action expert, from its own modules, with fewer operations.

Differs from LeRobot's loop as follows, which changes its results by rounding alone:
- queries, keys and values come from one product, and are rotated together;
- attention is torch's fused one, with a mask that was made once;
- residuals are added by the products that make them;
- the last layer of the prefix makes keys and values only; the rest of it nobody reads.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .phases import Rotation, UnavailableError

# Rows of a mask start at multiples of this, because fused attention on a GPU would copy others at each call.
ALIGNMENT = 16


class Norm(NamedTuple):
    """A root-mean-square norm.

    Attributes:
        scale: float32 [c]; None where the projection behind it has it in its weights.
        shift: float32 [c], added to the result.
        bias: [heads * d], in place of a shift before an attention: what becomes of it in the projection behind it.
        gate: [c], a factor on what the block behind it adds.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None


class Heads(NamedTuple):
    """Heads of an attention.

    Attributes:
        queries: h.
        keys: g; values have as many.
        width: d.
    """

    queries: int
    keys: int
    width: int


class DecoderLayer(nn.Module):
    """Attention and gated MLP.

    Args:
        layer: The layer of the policy, with `self_attn` (q_proj, k_proj, v_proj, o_proj) and `mlp` (gate_proj, up_proj,
            down_proj, act_fn).
        heads: Its heads.
        eps: Of its norms.
        scale: [c], of the norm before the attention, if it is always the same: it becomes part of the weights.
        own_keys: Whether its tokens attend to each other, too, and not only to those in a cache.

    Raises:
        UnavailableError: If one of its projections is not a plain linear layer.
    """

    def __init__(
        self, layer: Any, heads: Heads, eps: float, *, scale: Tensor | None = None, own_keys: bool = True
    ) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.heads, self.eps, self.scaling = heads, eps, heads.width**-0.5
        projections = [attention.q_proj, *([attention.k_proj, attention.v_proj] if own_keys else [])]
        for linear in (*projections, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            require_plain(linear)
        self.weight: Tensor
        self.bias: Tensor | None
        weight = torch.cat([linear.weight for linear in projections])
        if scale is not None:
            weight = (weight.float() * scale).to(weight.dtype)
        self.register_buffer("weight", weight, persistent=False)
        biases = [linear.bias for linear in projections if linear.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None, persistent=False)
        self.output, self.gate, self.up, self.down = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.activation = mlp.act_fn

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        mask: Tensor,
        before: Norm,
        after: Norm,
        cached: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            hidden: [b, t, c].
            rotation: Of these tokens, for all heads that come from them.
            mask: Added to the scores, broadcast to [b * g, 1, t, p + t].
            before: The norm before the attention.
            after: The norm before the MLP.
            cached: Keys and values [b, 2 * g, p, d] of tokens in front of these.

        Returns:
            ([b, t, c], keys and values [b, 2 * g, t, d] of these tokens).
        """
        heads = self._project(hidden, rotation, before, 0)
        own = heads[:, :, self.heads.queries :].transpose(1, 2)
        parts = [part for part in (cached, own) if part is not None and part.shape[1] > 0]
        keys_values = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        attended = attend(heads[:, :, : self.heads.queries], keys_values, mask, self.scaling)
        hidden = _add(hidden, attended, self.output, before.gate)
        inner = normalise(hidden, after, self.eps).to(self.gate.weight.dtype)
        inner = self.activation(self.gate(inner)) * self.up(inner)
        return _add(hidden, inner, self.down, after.gate), own

    def change_weights(self, change: Callable[[nn.Linear], nn.Linear]) -> None:
        """Go on with other weights.

        Args:
            change: A linear layer to what takes its place; the layer itself stays as it is.
        """
        joined = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False, device="meta")
        joined.weight = nn.Parameter(self.weight, requires_grad=False)
        self.weight = change(joined).weight.detach()
        self.output, self.gate, self.up, self.down = map(change, (self.output, self.gate, self.up, self.down))

    def keys_values(self, hidden: Tensor, rotation: Rotation, before: Norm) -> Tensor:
        """Only the keys and values [b, 2 * g, t, d] of `forward`."""
        return self._project(hidden, rotation, before, self.heads.queries).transpose(1, 2)

    def _project(self, hidden: Tensor, rotation: Rotation, before: Norm, first: int) -> Tensor:
        """Queries, keys and values [b, t, heads, d], rotated, from the head with number `first` on."""
        heads = self._unrotated(hidden, before, first)
        rows = slice(first if rotation.cos.shape[2] > 1 else 0, None)
        return rotate(heads, Rotation(rotation.cos[:, :, rows], rotation.sin[:, :, rows]))

    def _unrotated(self, hidden: Tensor, before: Norm, first: int) -> Tensor:
        """The same before they are rotated."""
        inner = normalise(hidden, before, self.eps).to(self.weight.dtype)
        start = first * self.heads.width
        bias = self.bias if before.bias is None else before.bias
        bias = None if bias is None else bias[start:]
        return F.linear(inner, self.weight[start:], bias).unflatten(-1, (-1, self.heads.width))


def prefix_keys_values(
    layers: Iterable[Any], hidden: Tensor, rotation: Rotation, mask: Tensor, scales: Tensor
) -> list[Tensor]:
    """Keys and values [b, 2 * g, p, d] of a prefix, of each layer.

    Args:
        layers: `DecoderLayer`s that have the scale of their first norm in their weights.
        hidden: The prefix, [b, p, c].
        rotation: Of the prefix.
        mask: Added to the scores.
        scales: float32 [layers, c] or more rows, of the norms before the MLPs.
    """
    found = []
    *earlier, last = layers
    for layer, scale in zip(earlier, scales.unbind(), strict=False):
        hidden, own = layer(hidden, rotation, mask, Norm(), Norm(scale))
        found.append(own)
    return [*found, last.keys_values(hidden, rotation, Norm())]


def normalise(hidden: Tensor, norm: Norm, eps: float) -> Tensor:
    """Root-mean-square norm of [b, t, c], in float32 where it has a scale."""
    if norm.scale is None:
        return F.rms_norm(hidden, hidden.shape[-1:], None, eps)
    normed = F.rms_norm(hidden.float(), norm.scale.shape, norm.scale, eps)
    return normed if norm.shift is None else normed + norm.shift


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the two halves of the channels of [b, t, heads, d] against each other, in the tables' precision."""
    first, second = heads.to(rotation.cos.dtype).chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return torch.addcmul(heads * rotation.cos, swapped, rotation.sin).to(heads.dtype)


def rotation_tables(cos: Tensor, sin: Tensor, rotated: int, plain: int) -> Rotation:
    """Tables for `rotate`, from those of the angles.

    Args:
        cos: [b, t, d], both halves alike.
        sin: [b, t, d], both halves alike.
        rotated: Heads that are rotated.
        plain: Heads behind them that are not: values go the same way, and rotating them by nothing is exact.
    """
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    if plain == 0:
        return Rotation(cos[:, :, None], sin[:, :, None])
    wide = [table[:, :, None].expand(-1, -1, rotated, -1) for table in (cos, sin)]
    still = [table[:, :, None].expand(-1, -1, plain, -1) for table in (torch.ones_like(cos), torch.zeros_like(sin))]
    return Rotation(*(torch.cat(pair, dim=2) for pair in zip(wide, still, strict=True)))


def attend(queries: Tensor, keys_values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Fused attention in which several query heads share a key head.

    Args:
        queries: [b, t, h, d].
        keys_values: [b, 2 * g, s, d], keys and then values.
        mask: Added to the scores, broadcast to [b * g, 1, t, s].
        scaling: Factor on the products of queries and keys.

    Returns:
        [b, t, h * d].
    """
    size, length, heads, width = queries.shape
    groups = keys_values.shape[1] // 2
    shared = heads // groups
    # Key heads join the batch: then each is one head that all queries share, which needs no copy.
    queries = queries.unflatten(2, (groups, shared)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    keys, values = (
        part.flatten(0, 1)[:, None].expand(-1, shared, -1, -1) for part in keys_values.to(queries.dtype).chunk(2, dim=1)
    )
    attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    attended = attended.unflatten(0, (size, groups)).permute(0, 3, 1, 2, 4)
    return attended.reshape(size, length, heads * width)


def score_mask(visible: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores.

    Args:
        visible: bool [b, t or 1, s].
        groups: g, key heads.
        dtype: Of the scores.

    Returns:
        [b * g, 1, t or 1, s], 0 where something is visible.
    """
    width = visible.shape[-1]
    hidden = F.pad(~visible, (0, -width % ALIGNMENT)).repeat_interleave(
        groups, dim=0, output_size=len(visible) * groups
    )
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)
    return mask[:, None, :, :width]


def add_linear(residual: Tensor, inner: Tensor, linear: nn.Linear) -> Tensor:
    """A linear layer's output plus a residual of the same shape, in one operation."""
    residual, inner = residual.to(linear.weight.dtype), inner.to(linear.weight.dtype)
    # Other kinds of linear layers have a product of their own, and none that adds.
    if linear.bias is not None or type(linear) is not nn.Linear:
        return residual + linear(inner)
    added = torch.addmm(residual.flatten(0, 1), inner.flatten(0, 1), linear.weight.t())
    return added.view(residual.shape)


def _add(residual: Tensor, inner: Tensor, linear: nn.Linear, gate: Tensor | None) -> Tensor:
    if gate is None:
        return add_linear(residual, inner, linear)
    return torch.addcmul(residual, linear(inner.to(linear.weight.dtype)), gate.to(residual.dtype))


def require_plain(linear: nn.Module) -> None:
    """Refuse a layer whose weights are not all that it does, such as one with low-rank matrices beside them.

    Raises:
        UnavailableError: If it is not exactly `nn.Linear`, or has hooks.
    """
    if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
        raise UnavailableError(
            f"a projection is a {type(linear).__name__} or has hooks, and only plain linear layers are joined; merge "
            "low-rank matrices into the weights"
        )
