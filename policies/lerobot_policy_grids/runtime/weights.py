"""Whether weights are still those from which something was computed, and where those lie that nothing reads."""

from collections.abc import Container, Iterable

import torch
from torch import nn

from ..modules import all_modules

Mark = tuple[tuple[int, int], ...]


def mark(modules: Iterable[nn.Module], unused: Container[nn.Module] = ()) -> Mark:
    """What changes when a weight of these modules is replaced, moved, or written to.

    Reads no values: where a weight lies, and how often torch has written to it. What is written through `weight.data`
    goes unnoticed.

    Args:
        modules: Whose weights count.
        unused: Parts of them whose weights do not.
    """
    return tuple(
        (weight.data_ptr(), weight._version)
        for module in all_modules(modules, unused)
        for weight in module._parameters.values()
        if weight is not None
    )


class Parking:
    """Modules whose weights nothing reads for a while: they lie in the CPU's memory, and not in the GPU's.

    LeRobot's policies take the device of their first weight for that of all, so a parked module comes last among the
    modules of its parent until it is back.
    """

    def __init__(self) -> None:
        self._devices: dict[nn.Module, torch.device] = {}
        self._orders: dict[nn.Module, list[str]] = {}

    def __contains__(self, module: object) -> bool:
        return module in self._devices

    def park(self, module: nn.Module, policies: Iterable[nn.Module]) -> None:
        """Move a module to the CPU's memory.

        Args:
            module: With weights, all on one GPU.
            policies: That have it.
        """
        self._devices[module] = next(module.parameters()).device
        module.cpu()
        for parent in [parent for policy in policies for parent in policy.modules()]:
            names = [name for name, part in parent._modules.items() if part is module]
            if names:
                self._orders.setdefault(parent, list(parent._modules))
                _put_last(parent, names)

    def bring_back(self) -> None:
        """Move all to where they were."""
        for module, device in self._devices.items():
            module.to(device)
        for parent, names in self._orders.items():
            _put_last(parent, names)
        self._devices.clear()
        self._orders.clear()


def _put_last(parent: nn.Module, names: list[str]) -> None:
    for name in names:
        parent._modules[name] = parent._modules.pop(name)
