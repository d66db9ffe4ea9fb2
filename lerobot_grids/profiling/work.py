"""Count what an action chunk computes and which weights it reads, by stage, while it runs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, mm_flop, sdpa_flop

from .roofline import Work

aten = torch.ops.aten
FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._int_mm: mm_flop,
    # Where a module calls attention itself, such as torch's own multi-head attention.
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
}
# They read a few rows of a table.
LOOK_UPS = frozenset({"aten::embedding", "aten::index_select", "aten::index", "aten::gather"})


class WorkCounter(TorchDispatchMode):
    """Counts in this block. torch.compile does not work in it, and what a CUDA graph replays is not seen.

    Args:
        weights: Parameters and buffers whose reading counts.

    Attributes:
        stages: Name of a stage -> its work. What runs outside all stages belongs to the first.
    """

    def __init__(self, weights: Iterable[Tensor], first: str = "prefill") -> None:
        super().__init__()
        self.stages: dict[str, Work] = {first: Work()}
        self._work, self._is_inside = self.stages[first], False
        self._weights = {tensor.untyped_storage()._cdata for weight in weights for tensor in _plain(weight)}
        # Storage -> bytes that this call of the stage has read of it.
        self._read: dict[int, int] = {}
        self._attention = _Attention(self)

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """In this block count for a stage, which reads its weights again."""
        before = self._work, self._read
        self._work, self._read = self.stages.setdefault(stage, Work()), {}
        try:
            yield
        finally:
            self._work, self._read = before

    def add_flops(self, dtype: torch.dtype, flops: int) -> None:
        name = str(dtype).removeprefix("torch.")
        self._work.flops[name] = self._work.flops.get(name, 0) + flops

    @contextmanager
    def counted_already(self) -> Iterator[None]:
        """In this block count no FLOPs."""
        self._is_inside = True
        try:
            yield
        finally:
            self._is_inside = False

    def __enter__(self) -> Any:
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        packet = func.overloadpacket
        if packet in FORMULAS and not self._is_inside:
            # The bias of addmm comes first, and has the dtype of the factors.
            self.add_flops(tensors[0].dtype, FORMULAS[packet](*args, **kwargs, out_val=result))
        if not func.is_view and func._schema.name not in LOOK_UPS:
            for tensor in tensors:
                self._note_reading(tensor)
        return result

    def _note_reading(self, tensor: Tensor) -> None:
        for plain in _plain(tensor):
            storage = plain.untyped_storage()
            if storage._cdata in self._weights:
                size = min(plain.numel() * plain.element_size(), storage.nbytes())
                more = size - self._read.get(storage._cdata, 0)
                if more > 0:
                    self._read[storage._cdata] = size
                    self._work.weight_bytes += more


class _Attention(TorchFunctionMode):
    """Fused attention as two products in its inputs' dtype, which kernels that compute in another would hide."""

    def __init__(self, counter: WorkCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with self._counter.counted_already():
            result = func(*args, **kwargs)
        query, key, value = (
            args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value"))
        )
        rows = query.shape[:-1].numel()
        self._counter.add_flops(query.dtype, 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1]))
        return result


def _plain(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor is made of; those of a quantised weight have its numbers and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))
