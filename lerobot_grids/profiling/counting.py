"""torch's counter of FLOPs, with what it counts wrongly."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count


def flop_counter() -> FlopCounterMode:
    """A counter of the FLOPs of matrix products, attention and convolutions; a multiply-add is 2."""
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    return counter


class _NoModules:
    """In place of the tracker of modules, whose hooks keep tensors alive under gradient checkpointing."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _convolution_backward(grad_output: Any, inputs: Any, weight: Any, *options: Any, **kwargs: Any) -> int:
    """As many FLOPs as the convolution, for each of the gradients of input and weight that is computed.

    torch (2.11) multiplies those of a grouped convolution by its groups.
    """
    transposed, mask = options[4], options[7]
    return sum(mask[:2]) * conv_flop_count(inputs, weight, grad_output, transposed)
