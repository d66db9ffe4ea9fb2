"""Whether weights are still those from which something was computed."""

from collections.abc import Container, Iterable, Iterator

from torch import nn

Mark = tuple[tuple[int, int], ...]


def mark(modules: Iterable[nn.Module], unused: Container[nn.Module] = ()) -> Mark:
    """What changes when a weight of these modules is replaced, moved, or written to.

    Reads no values: where a weight lies, and how often torch has written to it. What is written through `weight.data`
    goes unnoticed.

    Args:
        modules: Whose weights count.
        unused: Parts of them whose weights do not.
    """
    return tuple((weight.data_ptr(), weight._version) for weight in _weights(modules, unused))


def _weights(modules: Iterable[nn.Module], unused: Container[nn.Module]) -> Iterator[nn.Parameter]:
    # This runs before each action chunk, and `nn.Module.parameters` takes several times as long: it makes up names.
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in unused:
            yield from (weight for weight in module._parameters.values() if weight is not None)
            waiting.extend(part for part in module._modules.values() if part is not None)
