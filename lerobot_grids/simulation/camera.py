"""The camera that MetaWorld is seen through here, and how to point one."""

import mujoco
import numpy as np

CAMERA_POSITION, CAMERA_TARGET, CAMERA_FOVY = (0.6, 0.72, 0.68), (0.0, 0.74, 0.05), 42.0


def look_at(position: np.ndarray | tuple[float, ...], target: np.ndarray | tuple[float, ...]) -> np.ndarray:
    """Quaternion [4] of a MuJoCo camera at `position` that looks at `target`, upside down.

    Upside down, because LeRobot's environment turns the corner2 camera's image by 180 degrees.
    """
    backward = np.subtract(position, target)
    backward /= np.linalg.norm(backward)
    left = -np.cross((0.0, 0.0, 1.0), backward)
    left /= np.linalg.norm(left)
    rotation = np.stack([left, np.cross(backward, left), backward], axis=1)
    quaternion = np.empty(4)
    mujoco.mju_mat2Quat(quaternion, rotation.flatten())
    return quaternion
