"""Whether a policy's points lie on the object that its instruction names.

Moving points alone do not show that a policy looks: points can follow the robot's arm, or the light. Recordings of this
project's simulations hold where each camera sees the object (`data.PLACES`), so it can be counted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .coordinates import CellMetric

# A point within this distance of the object's centre, in cells of the feature map, is on it.
ON_OBJECT = 1.0


class ObjectHits(CellMetric):
    """Share of images in which at least one point is on the named object, and what the anchors alone would reach.

    Args:
        token_grid: (H, W) of the feature map.
    """

    def __init__(self, token_grid: tuple[int, int]) -> None:
        super().__init__(token_grid)
        # Images with the object in view, those with a point on it, those with an anchor on it.
        self.counts: Tensor
        self.add_state("counts", torch.zeros(3), dist_reduce_fx="sum")

    def update(self, coordinates: Tensor, anchors: Tensor, places: Tensor) -> None:
        """Count some images.

        Args:
            coordinates: [b, k, 2] in [0, 1], where the policy looked.
            anchors: [k, 2], from where its points started.
            places: [b, 2], where the object is; outside [0, 1] where the camera does not see it.
        """
        seen = ((places >= 0) & (places <= 1)).all(-1)
        hits = [
            (((points - places[:, None]) * self.cells).norm(dim=-1) <= ON_OBJECT).any(-1) & seen
            for points in (coordinates, anchors.expand_as(coordinates))
        ]
        self.counts += torch.stack([seen.sum(), *(hit.sum() for hit in hits)]).to(self.counts)

    def compute(self) -> dict[str, float]:
        """{"on_object": share, "anchors_on_object": share}; empty if no image shows the object."""
        images, points, anchors = self.counts.tolist()
        return {} if images == 0 else {"on_object": points / images, "anchors_on_object": anchors / images}


def object_places(
    batch: dict[str, Any], names: list[str], camera: str, region: Sequence[float], name: str
) -> Tensor | None:
    """Where a camera sees the object, [b, 2] in [0, 1] of what the vision tower sees; None if the dataset does not say.

    An object beside the camera's image is at (-1, -1).

    Args:
        batch: A batch with the column `name`, whose places are shares of the camera's image.
        names: The names of its entries, such as "image2_object_x".
        camera: The policy's name of the camera, such as "observation.images.image2".
        region: (left, top, right, bottom) of the camera's image in what the vision tower sees.
        name: Name of the column.
    """
    wanted = [f"{camera.rpartition('.')[2]}_object_{axis}" for axis in "xy"]
    if name not in batch or not set(wanted) <= set(names):
        return None
    places: Tensor = batch[name][..., [names.index(entry) for entry in wanted]]
    left, top, right, bottom = region
    mapped = places.new_tensor([left, top]) + places * places.new_tensor([right - left, bottom - top])
    # Beside the image there may be padding, which the tower sees.
    return mapped.where(((places >= 0) & (places <= 1)).all(-1, keepdim=True), -1.0)
