"""How exactly products of float32 matrices are computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
