"""Whether weights are still those from which something was computed."""

from collections.abc import Iterable

from torch import nn

Mark = tuple[tuple[int, int], ...]


def mark(modules: Iterable[nn.Module], unused: Iterable[nn.Module] = ()) -> Mark:
    """What changes when a weight of these modules is replaced, moved, or written to.

    Reads no values: where a weight lies, and how often torch has written to it. What is written through `weight.data`
    goes unnoticed.

    Args:
        modules: Whose weights count.
        unused: Parts of them whose weights do not.
    """
    left_out = {id(parameter) for module in unused for parameter in module.parameters()}
    weights = (parameter for module in modules for parameter in module.parameters() if id(parameter) not in left_out)
    return tuple((weight.data_ptr(), weight._version) for weight in weights)
