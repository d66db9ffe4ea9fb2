"""Where a dense policy looks, and how far a sampler's points are from there.

The saliency of a visual token is how much the policy's prediction would change if the token were like the mean of its
image: the square of gradient times difference (input x gradient, Shrikumar et al. 2016), along a random direction of
the prediction, which over many steps counts each direction alike (Hutchinson 1989). It asks no family for attention
weights, which fused kernels do not keep.
"""

import torch
from torch import Tensor

from lerobot_policy_grids.reducers.layout import cell_coordinates


def saliency(output: Tensor, dense_map: Tensor, size: int, extra: int = 0) -> Tensor:
    """The share of each visual token in what a prediction depends on, float32 [b, cameras, n]; it sums to 1.

    Args:
        output: The prediction, of any shape, with the graph that leads to the map.
        dense_map: The visual tokens of all cameras, camera by camera, a leaf of autograd [cameras * b, n, c].
        size: b, the size of the batch.
        extra: Tokens in front of each camera's that are no cells of it, and are left out.
    """
    (gradient,) = torch.autograd.grad(output, dense_map, torch.randn_like(output))
    different = (dense_map - dense_map.mean(1, keepdim=True)).detach().float()
    changes = (gradient.float() * different).sum(-1).square()[:, extra:].unflatten(0, (-1, size)).transpose(0, 1)
    return changes / changes.sum((1, 2), keepdim=True).clamp_min(torch.finfo(changes.dtype).tiny)


def distance_to_points(saliency: Tensor, coordinates: list[Tensor], token_grid: tuple[int, int]) -> Tensor:
    """Squared distance in cells from salient cells to the nearest point, a scalar: soft K-means with these weights.

    Args:
        saliency: float32 [b, cameras, H * W]; those of cameras without points come last.
        coordinates: float32 [b, k, 2] of each camera, (x, y) in [0, 1].
        token_grid: (H, W).
    """
    height, width = token_grid
    cells, size = cell_coordinates(token_grid, saliency.device), saliency.new_tensor([width, height])
    total = saliency.new_zeros(())
    for camera, places in enumerate(coordinates):
        away = ((places.float()[:, :, None] - cells) * size).square().sum(-1)
        nearest = ((-away).softmax(1) * away).sum(1)
        total = total + (saliency[:, camera] * nearest).sum(-1).mean()
    return total
