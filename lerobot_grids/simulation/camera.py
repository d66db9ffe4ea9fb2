"""The camera of this package's MetaWorld, and functions that orient a camera."""

import mujoco
import numpy as np

CAMERA_POSITION, CAMERA_TARGET, CAMERA_FOVY = (0.6, 0.72, 0.68), (0.0, 0.74, 0.05), 42.0


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
