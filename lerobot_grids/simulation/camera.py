"""The camera of this package's MetaWorld, and functions that orient a camera."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mujoco
import numpy as np

CAMERA_POSITION, CAMERA_TARGET, CAMERA_FOVY = (0.6, 0.72, 0.68), (0.0, 0.74, 0.05), 42.0

# MuJoCo's viewers draw no geom of this group.
HIDDEN_GROUP = 5

Point = np.ndarray | tuple[float, float, float]


def camera_axes(position: Point, target: Point) -> np.ndarray:
    """Axes of a MuJoCo camera at `position` that looks at `target`: [3, 3] with columns left, down and backward.

    The image is upside down, because LeRobot's environment turns the corner2 camera's image by 180 degrees.
    """
    backward = np.subtract(position, target)
    backward /= np.linalg.norm(backward)
    left = -np.cross((0.0, 0.0, 1.0), backward)
    left /= np.linalg.norm(left)
    return np.stack([left, np.cross(backward, left), backward], axis=1)


def look_at(position: Point, target: Point) -> np.ndarray:
    """Orientation of a camera as a quaternion [4]; see `camera_axes`."""
    quaternion = np.empty(4)
    mujoco.mju_mat2Quat(quaternion, camera_axes(position, target).flatten())
    return quaternion


@contextmanager
def only_geoms_in_view(model: Any, data: Any, camera: int) -> Iterator[None]:
    """In this block MuJoCo draws the geoms that a camera with a square image can see; otherwise it draws them all.

    A geom is out of view if its bounding sphere is. Planes have no such sphere and stay.
    """
    groups, radii = model.geom_group.copy(), model.geom_rbound
    # Along the camera's axes: right, up and backward.
    places = (data.geom_xpos - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)
    half = np.radians(model.cam_fovy[camera]) / 2
    beyond_the_edge = np.abs(places[:, :2]).max(axis=1) * np.cos(half) + places[:, 2] * np.sin(half)
    out_of_view = (beyond_the_edge > radii) | (places[:, 2] > radii)
    model.geom_group[out_of_view & (radii > 0)] = HIDDEN_GROUP
    try:
        yield
    finally:
        model.geom_group[:] = groups
