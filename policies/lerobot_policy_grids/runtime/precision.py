"""How exactly products of float32 matrices are computed, and copies of modules that are less exact."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# What torch calls them. On a GPU that has them: tf32 rounds inputs to 10 bits, bf16 to 7; weights stay float32.
MATMUL = {"fp32": "highest", "tf32": "high", "bf16": "medium"}
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


def in_bfloat16(module: nn.Module) -> nn.Module:
    """A copy with weights in bfloat16, made without one in the precision that they have."""
    weights = {
        id(weight): nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
        for weight in module.parameters()
    }
    return copy.deepcopy(module, weights)
