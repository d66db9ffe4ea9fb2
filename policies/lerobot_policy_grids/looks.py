"""Where a policy looks, and drawing it over the pictures that a LeRobot command shows in rerun."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from .families.seam import present_cameras
from .reducers.anchors import Region

COLOUR = (255, 226, 40)
# LeRobot's names of a camera: in a batch, and on the screen.
IN_BATCH, ON_SCREEN = "observation.images.", "observation."


@dataclass(frozen=True)
class Points:
    """Where one camera's image is read.

    Attributes:
        coordinates: float32 [k, 2], (x, y) in [0, 1] of what the vision tower sees.
        reads: How far a token reads to the side, and up and down, in [0, 1] of what the vision tower sees; None where
            tokens differ in it.
        region: Where the camera's image lies in what the vision tower sees; the rest is padding.
    """

    coordinates: np.ndarray
    reads: tuple[float, float] | None
    region: Region

    def in_camera(self) -> np.ndarray:
        """Coordinates [k, 2] as a share of the camera's image; outside [0, 1] for points in the padding."""
        left, top, right, bottom = self.region
        corner, size = np.array([left, top]), np.array([right - left, bottom - top])
        return (np.asarray(self.coordinates, dtype=float) - corner) / size

    def in_padding(self) -> np.ndarray:
        """Which points lie in the padding, bool [k]."""
        places = self.in_camera()
        lost: np.ndarray = np.any((places < 0) | (places > 1), axis=-1)
        return lost


def points_of(policy: Any, camera: int, coordinates: np.ndarray, shape: Sequence[int]) -> Points:
    """The points of a grids policy's camera, by number, whose image has this height and width."""
    (rows, columns), cells = policy.seam.layout.token_grid, policy.reducer.reads(policy.num_tokens, camera)
    reads = None if cells is None else (cells[0] / columns, cells[1] / rows)
    return Points(coordinates, reads, policy.family.seen_region(policy.base, shape[0], shape[1]))


def rerun_points(points: Points, shape: Sequence[int], colour: tuple[int, int, int] = COLOUR) -> dict[str, Any]:
    """What rerun draws over an image of this height and width: name -> points in its pixels.

    "points" are the coordinates. "reads" are discs as wide as a token reads to the side.
    """
    import rerun

    height, width = shape
    left, _, right, _ = points.region
    radius = 1.0 if points.reads is None else points.reads[0] / (right - left) * width
    places = points.in_camera() * (width, height)
    return {
        "points": rerun.Points2D(places, colors=[*colour, 255], radii=max(1.0, width / 90)),
        "reads": rerun.Points2D(places, colors=[*colour, 40], radii=radius),
    }


def showing(policy: Any, batch: Mapping[str, Any]) -> AbstractContextManager[None]:
    """In this block a grids policy acts, and where this process shows its cameras in rerun, points appear over them.

    That is what `--display_data=true` does in LeRobot's commands. Nothing is computed for it elsewhere. Points belong
    to reducers that read the map, and to the eager runtime: a recorded graph keeps its coordinates to itself.
    """
    if torch.compiler.is_compiling() or not are_shown():
        return nullcontext()
    return _drawing(policy, batch, sys.modules["rerun"])


def are_shown() -> bool:
    """Whether this process shows cameras in rerun."""
    rerun = sys.modules.get("rerun")
    return rerun is not None and rerun.get_global_data_recording() is not None


@cache
def warn_of_eager_points() -> None:
    """Say, once, what it costs to show points."""
    logging.getLogger(__name__).warning(
        "points are drawn over the cameras, so the policy acts eagerly; --policy.runtime=fast acts faster, without them"
    )


@contextmanager
def _drawing(policy: Any, batch: Mapping[str, Any], rerun: Any) -> Iterator[None]:
    seam = policy.seam
    shapes = {name: batch[name].shape[-2:] for name in seam.layout.cameras if name in batch}
    # Most calls take an action from a queue, and look at nothing.
    seam.coordinates = []
    yield
    try:
        for camera, coordinates in zip(present_cameras(seam.layout.cameras, shapes), seam.coordinates, strict=False):
            name = seam.layout.cameras[camera]
            points = points_of(policy, camera, coordinates[0].float().cpu().numpy(), shapes[name])
            # Static as LeRobot's images are: the last ones are shown.
            for part, drawn in rerun_points(points, shapes[name]).items():
                rerun.log(f"{name.replace(IN_BATCH, ON_SCREEN)}/{part}", drawn, static=True)
    except Exception as error:  # a picture must not stop a robot
        logging.getLogger(__name__).warning(f"where the policy looks is not shown: {type(error).__name__}: {error}")
