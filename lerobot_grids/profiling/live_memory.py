"""Bytes that tensors hold while a block runs."""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Count the bytes of the tensors that operations in this block make, until they are freed, on any device.

    Tensors that share a storage count once. Memory that a kernel uses within one operation is not seen, and neither are
    the gaps of an allocator.

    Args:
        weights: Tensors that are not counted. The gradients of parameters among them are counted as `gradients`.

    Attributes:
        live: Bytes now, without gradients of parameters.
        peak: Largest value of `live`.
        gradients: Bytes of the gradients of parameters.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = 0
        # Storage -> its bytes, and a weak reference that says when it is freed.
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        for tensor in weights:
            self._note(tensor, 0)
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(self._note_gradient)

    def add(self, tensors: Any) -> None:
        """Count the tensors in a nested structure that were made before."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._note(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result

    def _note(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if size is None else size
        self._references[key] = weakref.ref(storage, partial(self._forget, key))
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, reference: Any) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._references.pop(key, None)

    def _note_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        self.live -= self._sizes.get(storage._cdata, 0)
        self._sizes[storage._cdata] = 0
        self.gradients += storage.nbytes()
