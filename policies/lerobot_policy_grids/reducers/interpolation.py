"""Read a feature map between its cells. Positions are in cells: 0 is the centre of the first, w - 1 of the last.

Positions outside the map are read at its border. Arithmetic is float32 for every dtype of the feature map.
"""

import torch
from torch import Tensor

from .layout import take

INTERPOLATIONS = ("antialiased", "bilinear", "nearest")


def bilinear(feature_map: Tensor, pixels: Tensor) -> Tensor:
    """Read between the four cells around each position.

    Equal to `F.grid_sample(align_corners=False, padding_mode="border")` at (pixels + 0.5) / (w, h), but
    exact at whole numbers. It reads the channels-last layout that vision towers produce.

    Args:
        feature_map: [b, h, w, c], any float dtype.
        pixels: float32 [b, k, 2], (column, row).

    Returns:
        [b, k, c] in the feature map's dtype.
    """
    height, width = feature_map.shape[1:3]
    flat = feature_map.flatten(1, 2)
    left, right, x = _neighbours(pixels[..., 0], width)
    above, below, y = _neighbours(pixels[..., 1], height)

    def cell(column: Tensor, row: Tensor) -> Tensor:
        return take(flat, row * width + column).float()

    top = (1 - x) * cell(left, above) + x * cell(right, above)
    bottom = (1 - x) * cell(left, below) + x * cell(right, below)
    return ((1 - y) * top + y * bottom).to(feature_map.dtype)


def antialiased(feature_map: Tensor, pixels: Tensor, reach: float) -> Tensor:
    """Read the mean around each position, weighted by a tent that falls to zero `reach` cells away, per axis.

    A few bilinear readings miss the cells between them; these readings are as wide as their spacing. The filter is that
    of `F.interpolate(mode="bilinear", antialias=True)`, where positions form a lattice and the reach is its spacing.
    With a reach of 1 the result equals `bilinear`.

    Args:
        feature_map: [b, h, w, c], any float dtype.
        pixels: float32 [b, k, 2], (column, row).
        reach: Half the width of the tent in cells, at least 1.

    Returns:
        [b, k, c] in the feature map's dtype.
    """
    height, width = feature_map.shape[1:3]
    columns, rows = tent(pixels[..., 0], width, reach), tent(pixels[..., 1], height, reach)
    weights = (rows[..., :, None] * columns[..., None, :]).flatten(2)
    return (weights @ feature_map.flatten(1, 2).float()).to(feature_map.dtype)


def _neighbours(positions: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """On one axis: (previous cell, next cell, each int64 [b, k]; fraction between them, [b, k, 1])."""
    positions = positions.clamp(0, cells - 1)
    low = positions.detach().floor()
    return low.long(), (low.long() + 1).clamp(max=cells - 1), (positions - low)[..., None]


def tent(positions: Tensor, cells: int, reach: float) -> Tensor:
    """Weights [..., cells] of the cells along one axis around positions [...] in cells; they add up to 1."""
    at = torch.arange(cells, device=positions.device, dtype=torch.float32)
    weights = (1 - (at - positions.clamp(0, cells - 1)[..., None]).abs() / reach).clamp_min(0)
    return weights / weights.sum(-1, keepdim=True)
