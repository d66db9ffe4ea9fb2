"""Run a policy on the meta device whose prompt decides which operations run: integers keep their values on the CPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# They take a CPU index or mask into a meta tensor, and give a meta tensor of the right shape.
INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "embedding", "masked_scatter", "nonzero"})
CREATED = frozenset({"arange", "full", "ones", "zeros", "empty", "scalar_tensor", "new_full", "new_zeros", "new_ones"})


class KnownValues(TorchDispatchMode):
    """In this mode integers and bools that would go to the meta device stay on the CPU, and may meet meta tensors."""

    def __enter__(self) -> Any:
        self._of_lists = _OfLists()
        self._of_lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._of_lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        to_meta = torch.device(kwargs["device"]).type == "meta" if kwargs.get("device") is not None else False
        if name == "_to_copy" and to_meta and args[0].device.type == "cpu" and not args[0].is_floating_point():
            kwargs["device"] = torch.device("cpu")
        if name in CREATED and to_meta and _counts(name, args, kwargs):
            kwargs["device"] = torch.device("cpu")
        devices: set[str] = set()
        tree_map_only(torch.Tensor, lambda tensor: devices.add(tensor.device.type), (args, kwargs))
        stays = name in INDEXED and isinstance(args[0], torch.Tensor) and args[0].is_meta
        if "meta" in devices and len(devices) > 1 and not stays:
            args, kwargs = tree_map_only(torch.Tensor, _to_meta, (args, kwargs))
        return func(*args, **kwargs)


class _OfLists(TorchFunctionMode):
    """Tensors that are made of a list, whose way to the meta device no dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            made = func(*args, **kwargs | {"device": "cpu"})
            return made.to("meta") if made.is_floating_point() else made
        return func(*args, **kwargs)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    # Of one element without dimensions a CPU tensor is as good.
    return tensor if tensor.is_meta or not tensor.ndim else torch.empty_like(tensor, device="meta")


def _counts(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether what is created holds integers or bools."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not dtype.is_floating_point
    numbers = [value for value in args if isinstance(value, (bool, int, float))]
    return name in ("arange", "full", "scalar_tensor") and all(not isinstance(value, float) for value in numbers)
