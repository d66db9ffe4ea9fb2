"""How exactly a fast path computes: products of float32 matrices, and its copy of the vision tower."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .phases import Phases, UnavailableError

# What torch calls them. "high" rounds inputs of products to 10 bits on a GPU that can; weights stay float32. torch's
# "medium" does the same on a GPU, so bf16 has what torch does not do: a vision tower whose weights are bfloat16.
MATMUL = {"fp32": "highest", "tf32": "high", "bf16": "high"}
PRECISIONS = ("own", *MATMUL)


@contextmanager
def precisely(name: str) -> Iterator[None]:
    """In this block products of float32 have a precision, one of `PRECISIONS`; "own" is that of the process."""
    if name == "own":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(MATMUL[name])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def in_bfloat16(module: nn.Module, kept: Iterable[Any] = ()) -> nn.Module:
    """A copy with weights in bfloat16, made without one in the precision that they have.

    Args:
        module: Stays as it is. What is bfloat16 already is shared.
        kept: Objects that the module refers to and that are not to be copied.
    """
    memo: dict[int, Any] = {id(value): value for value in kept}
    for weight in module.parameters():
        memo[id(weight)] = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
    return copy.deepcopy(module, memo)


def round_vision(phases: Phases) -> None:
    """Give the prefill a copy of its vision tower with weights in bfloat16. The policy keeps its own, and the memory.

    Args:
        phases: Just built.

    Raises:
        UnavailableError: If they name no vision tower, or a hook watches it, which would not see the copy.
    """
    prefill = phases.prefill
    if not phases.vision:
        raise UnavailableError(
            "precision=bf16 computes the vision tower in bfloat16, and the phases of this policy name none; give "
            "precision=tf32"
        )
    parts = nn.ModuleList([prefill.get_submodule(name) for name in phases.vision])
    if any(module._forward_hooks or module._forward_pre_hooks for module in parts.modules()):
        raise UnavailableError(
            "a hook watches the vision tower, and precision=bf16 computes with a copy of it; remove the hook, or give "
            "precision=tf32"
        )
    # What is attached to the tower refers to the seam, and by it to the whole policy.
    copies: Any = in_bfloat16(parts, vars(prefill).values())
    for name, part in zip(phases.vision, copies, strict=True):
        setattr(prefill, name, part)
