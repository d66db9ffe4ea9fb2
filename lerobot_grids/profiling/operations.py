"""Operations of a policy: how often it asks torch to compute something.

On a GPU each is about one kernel to launch, and launches are what small batches wait for.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# One kernel on a GPU; a CPU, and the meta device, have several operations instead.
FUSED = (F.rms_norm, F.scaled_dot_product_attention)
# They return what they get.
VIEWS = frozenset({"aten::_unsafe_view", "aten::detach", "aten::lift_fresh"})


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.is_inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (self.is_inside or func.is_view or func._schema.name in VIEWS):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class _Fused(TorchFunctionMode):
    def __init__(self, dispatched: _Dispatched) -> None:
        super().__init__()
        self._dispatched = dispatched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in FUSED:
            return func(*args, **(kwargs or {}))
        self._dispatched.counts[func.__name__] += 1
        self._dispatched.is_inside = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._dispatched.is_inside = False


@contextmanager
def count_operations() -> Iterator[Counter[str]]:
    """In this block count operations that are no views, by name. Fused attention and norms are one each."""
    with _Dispatched() as dispatched, _Fused(dispatched):
        yield dispatched.counts
