"""Fewer triangles for small images.

LIBERO's scenes have 300 000 triangles, and on a CPU nearly all of the time of drawing goes into them. Corners of a
mesh that lie in one cell of a grid become one corner (vertex clustering; Rossignac and Borrel 1993), and triangles
without an area are left out. Textures and normals stay with the corners of the triangles.
"""

from typing import Any

import mujoco
import numpy as np

from .shapes import touches

# Cells along the longest side of a mesh.
CELLS = 20


def cluster(vertices: np.ndarray, faces: np.ndarray, cells: int = CELLS) -> tuple[np.ndarray, np.ndarray]:
    """Merge the corners of a mesh that lie in one cell of a grid.

    Args:
        vertices: [V, 3].
        faces: Triangles as numbers of vertices, [F, 3].
        cells: Number of cells along the longest side of the mesh.

    Returns:
        The triangles that are left, [f, 3], with the first vertex of each cell in place of all of them; and which of
        the given triangles these are, [f].
    """
    low, side = vertices.min(axis=0), np.ptp(vertices, axis=0).max()
    places = np.floor((vertices - low) / side * cells).astype(int)
    _, first, cell = np.unique(places, axis=0, return_index=True, return_inverse=True)
    merged = first[cell.reshape(-1)][faces]
    a, b, c = merged.T
    kept = np.flatnonzero((a != b) & (b != c) & (c != a))
    _, first = np.unique(np.sort(merged[kept], axis=1), axis=0, return_index=True)
    kept = kept[np.sort(first)]
    return merged[kept], kept


def simplify(model: Any, context: Any) -> None:
    """Give the meshes of a scene that are only drawn fewer triangles, in place, and send them to the renderer.

    Args:
        model: MuJoCo's model. Meshes that touch something keep their triangles.
        context: MuJoCo's rendering context, current on this thread.
    """
    is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    for mesh in np.setdiff1d(model.geom_dataid[is_mesh], model.geom_dataid[is_mesh & touches(model)]):
        vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
        faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
        merged, kept = cluster(model.mesh_vert[vertices], model.mesh_face[faces])
        left = slice(faces.start, faces.start + len(kept))
        for corners in (model.mesh_facenormal, model.mesh_facetexcoord):
            corners[left] = corners[faces][kept]
        model.mesh_face[left] = merged
        model.mesh_facenum[mesh] = len(kept)
        mujoco.mjr_uploadMesh(model, context, int(mesh))
