"""Meshes with fewer triangles, on one whose shape is known. LIBERO itself is not needed."""

import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco")

from lerobot_grids.simulation.libero.meshes import cluster  # noqa: E402


def sphere(rings=40, columns=80):
    """(vertices, triangles) of a sphere of radius 1."""
    turn, tilt = np.meshgrid(np.linspace(0, 2 * np.pi, columns), np.linspace(0, np.pi, rings))
    vertices = np.stack([np.sin(tilt) * np.cos(turn), np.sin(tilt) * np.sin(turn), np.cos(tilt)], -1).reshape(-1, 3)
    first = (np.arange(rings - 1)[:, None] * columns + np.arange(columns - 1)).reshape(-1)
    near, far = np.stack([first, first + 1, first + columns], -1), np.stack([1, columns + 1, columns]) + first[:, None]
    return vertices, np.concatenate([near, far])


def area(vertices, faces):
    a, b, c = vertices[faces].transpose(1, 0, 2)
    return np.linalg.norm(np.cross(b - a, c - a), axis=-1).sum() / 2


@pytest.mark.parametrize("cells", [10, 20])
def test_a_sphere_stays_a_sphere(cells):
    vertices, faces = sphere()
    merged, kept = cluster(vertices, faces, cells)
    assert len(merged) == len(kept) < len(faces) * (cells / 30)
    # Every corner stays in its cell, and no cell has two.
    cell = np.floor((vertices - vertices.min(0)) / np.ptp(vertices, 0).max() * cells)
    np.testing.assert_array_equal(cell[merged], cell[faces[kept]])
    assert len(np.unique(merged)) == len(np.unique(cell[np.unique(merged)], axis=0))
    assert all(len(set(face)) == 3 for face in merged.tolist())
    assert area(vertices, merged) == pytest.approx(4 * np.pi, rel=0.1)


def test_fine_cells_change_nothing():
    vertices, faces = np.random.default_rng(0).uniform(size=(30, 3)), np.arange(30).reshape(10, 3)
    merged, kept = cluster(vertices, faces, cells=10_000)
    np.testing.assert_array_equal(merged, faces)
    np.testing.assert_array_equal(kept, np.arange(10))
