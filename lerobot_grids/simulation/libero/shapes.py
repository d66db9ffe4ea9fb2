"""What takes up space in the simulator: points of collision shapes, and turns."""

from typing import Any

import mujoco
import numpy as np


def collision_points(model: Any, data: Any, body: int, inside: int = 0) -> np.ndarray:
    """Corners [n, 3] in metres of a body's collision shapes in the world, with those of the bodies that it carries.

    Args:
        model: MuJoCo's model.
        data: Its state.
        body: Number of the body.
        inside: Number of points to add within each shape, because corners alone miss the sides of a tall box.
    """
    points = []
    for geom in _collision_geoms(model, _carried(model, body)):
        local = _local_points(model, geom)
        if inside:
            # Each shape is convex, so points between two of its points are within it.
            random = np.random.default_rng(0)
            one, other = (local[random.integers(len(local), size=inside)] for _ in range(2))
            local = np.concatenate([local, one + (other - one) * random.random((inside, 1))])
        points.append(local @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(points)


def touches(model: Any) -> np.ndarray:
    """Which shapes of a model can touch something, bool [geoms]; the others are only drawn."""
    able: np.ndarray = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    return able


def _carried(model: Any, body: int) -> set[int]:
    bodies = {body}
    for other in range(body + 1, model.nbody):
        if model.body_parentid[other] in bodies:
            bodies.add(other)
    return bodies


def _collision_geoms(model: Any, bodies: set[int]) -> list[int]:
    chosen: list[int] = np.flatnonzero(touches(model) & np.isin(model.geom_bodyid, list(bodies))).tolist()
    return chosen


def _local_points(model: Any, geom: int) -> np.ndarray:
    """Corners of a shape in its own axes; a cylinder has 24 around."""
    kind, size = model.geom_type[geom], model.geom_size[geom]
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        vertices: np.ndarray = model.mesh_vert[first : first + count]
        return vertices
    if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        around = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        return np.array([[size[0] * np.cos(a), size[0] * np.sin(a), s * size[1]] for a in around for s in (-1, 1)])
    if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        return corners / np.sqrt(3) * size[0]
    return corners * size


def rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """Axis times angle, [3] in radians, of a rotation matrix [3, 3]."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, matrix.ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def turned(matrix: np.ndarray, yaw: float) -> np.ndarray:
    """An orientation [3, 3] turned around the vertical by `yaw` radians."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]]) @ matrix
