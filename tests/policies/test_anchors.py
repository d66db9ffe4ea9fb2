"""Every prefix of the anchors covers the image."""

import hashlib

import pytest
import torch

from lerobot_policy_grids.reducers.anchors import anchor_cells, anchor_order

GRIDS = [(12, 12), (16, 16), (8, 8), (15, 20), (7, 14), (1, 5)]


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_order_visits_every_cell_once(height, width):
    assert sorted(anchor_order(height, width)) == list(range(height * width))


@pytest.mark.parametrize(("height", "width"), [(12, 12), (16, 16), (8, 8), (15, 20)])
def test_every_prefix_is_well_spread(height, width):
    unit = min(height, width)
    extent = torch.tensor([width, height]) / unit
    grid = torch.stack(torch.meshgrid(torch.linspace(0, 1, 40), torch.linspace(0, 1, 40), indexing="xy"), -1)
    everywhere = grid.flatten(0, 1) * extent
    for k in range(1, height * width + 1):
        points = (anchor_cells(height, width, k) + 0.5) / unit
        # In units of the spacing of a square lattice of k points, whose covering radius is 0.71.
        spacing = (extent.prod() / k).sqrt()
        covering = torch.cdist(everywhere, points).amin(1).max() / spacing
        assert covering < 1.4, (k, covering)
        if k > 1:
            distances = torch.cdist(points, points) + 10 * torch.eye(k)
            assert distances.min() / spacing > 0.5, (k, distances.min() / spacing)


def test_one_token_looks_at_the_centre():
    (column, row), *_ = anchor_cells(7, 7, 1).tolist()
    assert (column, row) == (3, 3)


@pytest.mark.parametrize("region", [(0.0, 0.25, 1.0, 1.0), (0.0, 0.125, 1.0, 0.875), (0.3, 0.0, 0.7, 1.0)])
def test_letterbox_padding_comes_last(region):
    left, top, right, bottom = region
    x, y = ((anchor_cells(16, 16, 256, region) + 0.5) / 16).T
    inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    count = int(inside.sum())
    assert 0 < count < 256
    assert inside[:count].all()
    assert sorted(anchor_order(16, 16, region)) == list(range(256))


def test_a_region_between_two_rows_of_centres_has_the_nearest_cells():
    _, y = anchor_cells(16, 16, 16, (0.0, 0.49, 1.0, 0.51)).T
    assert set(y.tolist()) <= {7, 8}


def test_the_order_is_what_checkpoints_were_trained_with():
    """Anchors are not saved: a change of their order would change every checkpoint, and needs a new version."""
    orders = [anchor_order(16, 16), anchor_order(12, 12, (0.0, 0.125, 1.0, 0.875)), anchor_order(8, 6)]
    digest = hashlib.sha256(repr(orders).encode()).hexdigest()
    assert digest[:16] == "dc3b99bd18f50245"


def test_prefixes_are_nested():
    for k in range(1, 144):
        assert torch.equal(anchor_cells(12, 12, k), anchor_cells(12, 12, 144)[:k])
