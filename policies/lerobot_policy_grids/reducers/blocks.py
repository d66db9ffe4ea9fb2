"""Tokens that are blocks of patches, for vision towers whose connector merges s x s patches into one token.

Between two layers of such a tower a cell of the token grid is a block of patches. A token sampled there is such a block
at a continuous place: s x s patches, one patch apart, read where the block lies. Positions are in cells of the map that
they belong to: a block at p on the token grid has its patch (i, j) at p * s + (j, i) on the patch grid. Where s is 1,
cells are patches, and nothing is done.
"""

import torch
from torch import Tensor


def patch_positions(cells: Tensor, block: int) -> Tensor:
    """Where the patches of blocks are.

    Args:
        cells: float32 [b, k, 2], (column, row) of each block on the token grid.
        block: s, patches along a side of a block.

    Returns:
        float32 [b, k * s * s, 2], (column, row) on the patch grid: block by block, each row by row.
    """
    if block == 1:
        return cells
    steps = torch.arange(block, device=cells.device, dtype=cells.dtype)
    within = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).flatten(0, 1)
    return (cells[:, :, None] * block + within).flatten(1, 2)


def block_means(patches: Tensor, block: int) -> Tensor:
    """The mean of each block: patches [b, h * s, w * s, c] to float32 cells [b, h, w, c]."""
    if block == 1:
        return patches.float()
    rows, columns = (size // block for size in patches.shape[1:3])
    return patches.float().unflatten(2, (columns, block)).unflatten(1, (rows, block)).mean((2, 4))


def block_reach(patches: float, block: int) -> float:
    """How far a block reads in cells, if each of its patches reads this far in patches."""
    return ((block - 1) / 2 + patches) / block


def spread(values: Tensor, block: int) -> Tensor:
    """Give every patch of a block the block's value: [b, k, c] to [b, k * s * s, c]."""
    return values if block == 1 else values.repeat_interleave(block * block, dim=1)


def join(patches: Tensor, block: int) -> Tensor:
    """One state of each block: its patches, which lie one after the other, [b, k * s * s, c] to [b, k, s * s * c]."""
    return patches.unflatten(1, (-1, block * block)).flatten(2)
