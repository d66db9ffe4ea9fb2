"""Statistics of sampled coordinates: whether points saturate at the border, collapse, or follow the image."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lerobot_policy_grids.reducers.anchored import AnchoredSampler
from lerobot_policy_grids.reducers.base import Sampled


class CellMetric(Metric):
    """A metric of distances that are counted in cells of a feature map.

    Args:
        token_grid: (H, W) of the feature map.
    """

    def __init__(self, token_grid: tuple[int, int]) -> None:
        super().__init__()
        self.cells: Tensor
        self.register_buffer("cells", torch.tensor([token_grid[1], token_grid[0]], dtype=torch.float32))


class CoordinateStatistics(CellMetric):
    """Statistics of sampled coordinates over a data set.

    `compute` gives, as plain numbers:
    - "spread": root of the mean squared distance from the centre of the image's points, in image sides. A full
      lattice has 0.41.
    - "border": share of the points outside the outermost cell centres, where moving changes nothing and no gradient
      comes back.
    - "duplicates": share of the points with another one of the same image within half a cell.
    - "drift": mean distance from the anchors, in cells.
    - "motion": how far points move from image to image: root of a point's variance, mean over points, in cells. Zero if
      the points are the same for every image.

    Args:
        token_grid: (H, W) of the feature map.
    """

    def __init__(self, token_grid: tuple[int, int]) -> None:
        super().__init__(token_grid)
        self.sums: Tensor
        self.add_state("sums", torch.zeros(4), dist_reduce_fx="sum")
        # Per point, in cells from its anchor: sums of x and y, sums of their squares, and the count.
        self.moves: Tensor
        self.add_state("moves", torch.zeros(token_grid[0] * token_grid[1], 5), dist_reduce_fx="sum")
        self.images: Tensor
        self.add_state("images", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, coordinates: Tensor, anchors: Tensor) -> None:
        """Count the points of some images.

        Args:
            coordinates: [b, k, 2] in [0, 1].
            anchors: [k, 2], those that they started from.
        """
        spread = (coordinates - coordinates.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()
        cells = coordinates * self.cells
        # A point exactly on the outermost centre can still move inwards.
        slack = 1e-4
        outside = (cells < 0.5 - slack) | (cells > self.cells - 0.5 + slack)
        apart = torch.cdist(cells, cells) + torch.eye(cells.shape[1], device=cells.device) * self.cells.sum()
        moved = cells - anchors * self.cells
        each = torch.stack(
            [
                spread,
                outside.any(-1).float().mean(1),
                (apart.min(-1).values < 0.5).float().mean(1),
                moved.norm(dim=-1).mean(1),
            ]
        )
        self.sums += each.sum(1)
        self.moves[: cells.shape[1]] += torch.cat([moved, moved.square(), torch.ones_like(moved[..., :1])], -1).sum(0)
        self.images += len(coordinates)

    def count(self, reducer: AnchoredSampler, inputs: Any, sampled: Sampled) -> None:
        """Update from what a sampler returns: a forward hook of it."""
        camera = inputs[3] if len(inputs) > 3 else 0
        self.update(sampled.coordinates.detach(), reducer.anchors(sampled.coordinates.shape[1], camera))

    def compute(self) -> dict[str, float]:
        """The means."""
        means = (self.sums / self.images.clamp_min(1)).tolist()
        first, second, count = self.moves[self.moves[:, 4] > 0].split([2, 2, 1], dim=1)
        variance = (second / count - (first / count).square()).clamp_min(0).sum(1)
        motion = float(variance.sqrt().mean()) if len(variance) else 0.0
        return dict(zip(("spread", "border", "duplicates", "drift"), means, strict=True)) | {"motion": motion}
