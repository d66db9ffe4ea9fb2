"""Reading a feature map between its cells. Positions are in cells: 0 is the centre of the first, w - 1 of the last.

Positions outside are read at the border. Arithmetic is float32 whatever the feature map's dtype.
"""

import torch
from torch import Tensor

INTERPOLATIONS = ("antialiased", "bilinear", "nearest")


def bilinear(feature_map: Tensor, pixels: Tensor) -> Tensor:
    """Read between the four cells around each position.

    Equal to `F.grid_sample(align_corners=False, padding_mode="border")` at (pixels + 0.5) / (w, h), but
    exact at whole numbers, and it gathers from the channels-last layout that vision towers produce.

    Args:
        feature_map: [b, h, w, c], any float dtype.
        pixels: float32 [b, k, 2], (column, row).

    Returns:
        [b, k, c] in the feature map's dtype.
    """
    width = feature_map.shape[2]
    flat = feature_map.flatten(1, 2)
    pixels, limit = _inside(feature_map, pixels)
    low = pixels.detach().floor()
    fraction = pixels - low
    low = low.long()
    high = torch.minimum(low + 1, limit.long())

    def cell(column: Tensor, row: Tensor) -> Tensor:
        index = (row * width + column)[..., None].expand(-1, -1, flat.shape[-1])
        return flat.gather(1, index).float()

    x, y = fraction[..., :1], fraction[..., 1:]
    top = (1 - x) * cell(low[..., 0], low[..., 1]) + x * cell(high[..., 0], low[..., 1])
    bottom = (1 - x) * cell(low[..., 0], high[..., 1]) + x * cell(high[..., 0], high[..., 1])
    return ((1 - y) * top + y * bottom).to(feature_map.dtype)


def antialiased(feature_map: Tensor, pixels: Tensor, reach: float) -> Tensor:
    """Read the mean around each position, weighted by a tent that falls to zero `reach` cells away, per axis.

    Few bilinear readings miss what lies between them; these are as wide as they are apart. It is the filter of
    `F.interpolate(mode="bilinear", antialias=True)`, whose positions are a lattice and whose reach is the lattice's
    spacing. With a reach of 1 it is `bilinear`.

    Args:
        feature_map: [b, h, w, c], any float dtype.
        pixels: float32 [b, k, 2], (column, row).
        reach: Half the width of the tent in cells, at least 1.

    Returns:
        [b, k, c] in the feature map's dtype.
    """
    pixels, _ = _inside(feature_map, pixels)
    columns, rows = (_tent(pixels[..., axis], feature_map.shape[2 - axis], reach) for axis in (0, 1))
    weights = (rows[..., :, None] * columns[..., None, :]).flatten(2)
    return (weights @ feature_map.flatten(1, 2).float()).to(feature_map.dtype)


def _inside(feature_map: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(positions within the map, the position of its last cell)."""
    limit = pixels.new_tensor([feature_map.shape[2] - 1, feature_map.shape[1] - 1])
    return pixels.clamp(min=torch.zeros_like(limit), max=limit), limit


def _tent(centres: Tensor, cells: int, reach: float) -> Tensor:
    """Weights [b, k, cells] of the cells of one axis, which add up to 1."""
    at = torch.arange(cells, device=centres.device, dtype=torch.float32)
    weights = (1 - (at - centres[..., None]).abs() / reach).clamp_min(0)
    return weights / weights.sum(-1, keepdim=True)
