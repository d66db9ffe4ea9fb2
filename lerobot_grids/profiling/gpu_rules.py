"""What a GPU does with a training step, on the meta device: mixed precision and fused attention.

Autocast has no rules for the meta device, and attention there keeps the matrix of all weights, which GPUs do not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior, as far as policies use them.
# fmt: off
IN_BFLOAT16 = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm",
    "mv", "addmm", "addbmm", "baddbmm", "einsum", "scaled_dot_product_attention",
}
IN_FLOAT32 = {
    "softmax", "log_softmax", "layer_norm", "group_norm", "exp", "log", "log1p", "pow", "__pow__", "__rpow__",
    "reciprocal", "rsqrt", "sum", "prod", "cumsum", "norm", "logsumexp", "softplus", "mse_loss", "l1_loss",
    "smooth_l1_loss", "huber_loss", "nll_loss", "cross_entropy", "kl_div", "binary_cross_entropy_with_logits",
    "cosine_similarity", "interpolate",
}
# fmt: on


class GpuRules(TorchFunctionMode):
    """In this block meta tensors follow CUDA's kernels; others are left alone.

    Args:
        mixed: Whether the step runs in Lightning's "bf16-mixed" instead of the precision of the weights.
    """

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed
        # Autocast keeps the bfloat16 copies of trained weights until the forward pass ends.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._keeps_copies = True

    def end_forward(self) -> None:
        """Forget copies of weights. What is computed again in the backward pass makes its own."""
        self._copies.clear()
        self._keeps_copies = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.mixed and name in IN_BFLOAT16:
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, self._halve, (args, kwargs))
        elif self.mixed and name in IN_FLOAT32:
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, _restore, (args, kwargs))
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            return fused_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _halve(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32 or not tensor.is_meta:
            return tensor
        if not (self._keeps_copies and tensor.is_leaf and tensor.requires_grad):
            return tensor.bfloat16()
        # The tensor itself is kept, so that no other gets its id.
        _, copy = self._copies.setdefault(id(tensor), (tensor, tensor.bfloat16()))
        return copy


def _restore(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_meta and tensor.dtype == torch.bfloat16 else tensor


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` by the memory-efficient kernel, [b, heads, n, d]."""
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    output: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
    return output
