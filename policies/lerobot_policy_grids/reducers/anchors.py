"""Anchors: the cells of the token grid in an order whose first k cells are spread over the image, for every k.

A sampler with budget k reads near the first k anchors, so one checkpoint serves every k.
"""

import functools
import math

import torch
from torch import Tensor

# (left, top, right, bottom) of the part of the image that is not letterbox padding, in [0, 1].
Region = tuple[float, float, float, float]
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


@functools.cache
def anchor_order(height: int, width: int, region: Region = WHOLE) -> tuple[int, ...]:
    """Order the cells of a grid so that the first k cover the image well, for every k.

    Farthest-point order: each next cell is the one farthest from those already chosen. Each cell also has a mirror
    image behind the image's border, at twice its distance to the border, which gives the spacing of a regular lattice.
    Without it the corners would come first, where there is little to see. Cells whose centre lies in letterbox padding
    come last.

    Args:
        height: H, rows of the token grid.
        width: W, columns of the token grid.
        region: Where the camera image lies in the square that the vision tower sees.

    Returns:
        The H * W cell indices (row-major, `row * W + column`), each once. In a tie the least crowded cell comes first,
        then the lower index, so the order is the same on every machine.
    """
    # In units of the grid's shorter side, so that distances are the same along both axes.
    unit = min(height, width)
    # On the CPU, even if the policy is built on another device or on the meta device.
    rows = (torch.arange(height, dtype=torch.float64, device="cpu") + 0.5) / unit
    columns = (torch.arange(width, dtype=torch.float64, device="cpu") + 0.5) / unit
    y, x = (axis.flatten() for axis in torch.meshgrid(rows, columns, indexing="ij"))
    left, right = region[0] * width / unit, region[2] * width / unit
    top, bottom = region[1] * height / unit, region[3] * height / unit
    border = torch.stack([x - left, right - x, y - top, bottom - y]).amin(0)
    # A region so thin that it holds no cell's centre has the cells that are nearest to it.
    padding = border < border.max().clamp_max(0)
    distance, crowding = torch.where(padding, -1.0, 2 * border.clamp_min(0)), torch.zeros_like(x)
    order: list[int] = []
    for _ in range(height * width):
        if distance.max() < 0:
            # All cells of the image are chosen; the padding follows, farthest from the image first.
            taken = torch.stack([torch.hypot(x - x[i], y - y[i]) for i in order]).amin(0)
            distance = taken.masked_fill(taken == 0, -1.0)
        # The tolerance makes symmetric cells tie on every platform, despite rounding.
        farthest = distance >= distance.max() - 1e-9
        chosen = int(crowding.round(decimals=6).masked_fill(~farthest, torch.inf).argmin())
        order.append(chosen)
        apart = torch.hypot(x - x[chosen], y - y[chosen])
        crowding += apart.clamp_min(1 / unit) ** -2
        distance = torch.minimum(distance, apart)
        distance[chosen] = -1.0
    return tuple(order)


def anchor_cells(height: int, width: int, num_tokens: int, region: Region = WHOLE) -> Tensor:
    """The first `num_tokens` anchors as integer cells.

    Returns:
        int64 [num_tokens, 2], each row (column, row) of a cell of the token grid.
    """
    order = torch.tensor(anchor_order(height, width, region)[:num_tokens], dtype=torch.int64)
    return torch.stack([order % width, order // width], dim=-1)


def region_cells(height: int, width: int, region: Region) -> tuple[slice, slice]:
    """The rows and columns of a grid whose centres lie in a region; at least one of each."""
    left, top, right, bottom = region
    return _span(top * height, bottom * height, height), _span(left * width, right * width, width)


def _span(start: float, stop: float, cells: int) -> slice:
    first = min(math.ceil(start - 0.5), cells - 1)
    return slice(first, max(math.floor(stop + 0.5), first + 1))
