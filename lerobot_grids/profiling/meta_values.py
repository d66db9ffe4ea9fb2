"""Run a training step on the meta device, although policies ask some tensors for their values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def meta_values() -> Iterator[None]:
    """In this block meta tensors answer what does not decide which operations run, and refuse the rest.

    - A float, which policies read for their logs, is 0.
    - A mask selects everything, and `all` of it is true: no padding, which is the most expensive batch.
    - Any other bool or integer raises `NotImplementedError`, because the operations that follow may depend on it.
    """
    options: Any = torch.fx.experimental._config
    with options.patch(meta_nonzero_assume_all_nonzero=True), _Values():
        yield


class _Values(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "all":
            result = func(*args, **kwargs)
            result.is_all = True
            return result
        if name == "_local_scalar_dense" and args[0].is_meta:
            if args[0].is_floating_point():
                return 0.0
            return True if hasattr(args[0], "is_all") else _refuse(args[0])
        if name == "_to_copy" and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type != "meta":
            dtype = kwargs.get("dtype") or args[0].dtype
            if not args[0].is_floating_point():
                _refuse(args[0])
            return torch.zeros(args[0].shape, dtype=dtype, device=kwargs["device"])
        return func(*args, **kwargs)


def _refuse(tensor: torch.Tensor) -> Any:
    raise NotImplementedError(f"the step depends on a value of type {str(tensor.dtype).removeprefix('torch.')}")
