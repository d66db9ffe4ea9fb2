"""Points on the named object are counted, in every camera, and only where it is seen."""

import pytest
import torch

from lerobot_grids.hits import ObjectHits, object_places

WHOLE = (0.0, 0.0, 1.0, 1.0)
NAMES = [f"{camera}_{thing}_{axis}" for camera in ("image", "image2") for thing in ("object", "goal") for axis in "xy"]


def test_a_point_within_a_cell_of_the_object_counts():
    metric = ObjectHits((10, 20))
    places = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [1.2, 0.5]])
    # 0.049 is just within a cell of 1 / 20; 0.11 is more than one of 1 / 10; the last object is out of view.
    points = torch.tensor([[0.549, 0.5], [0.5, 0.61], [0.551, 0.5], [1.0, 0.5]])[:, None]
    metric.update(points, torch.tensor([[0.5, 0.59]]), places)
    assert metric.compute() == {"on_object": pytest.approx(1 / 3), "anchors_on_object": pytest.approx(1.0)}


def test_one_point_of_several_is_enough():
    metric = ObjectHits((12, 12))
    points = torch.tensor([[[0.1, 0.1], [0.9, 0.9]]])
    metric.update(points, torch.zeros(2, 2), torch.tensor([[0.9, 0.9]]))
    assert metric.compute() == {"on_object": 1.0, "anchors_on_object": 0.0}


def test_nothing_is_said_of_objects_that_no_image_shows():
    metric = ObjectHits((12, 12))
    metric.update(torch.zeros(1, 1, 2), torch.zeros(1, 2), torch.tensor([[-1.0, -1.0]]))
    assert metric.compute() == {}


def test_each_camera_has_its_own_places():
    batch = {"places": torch.arange(16.0).reshape(2, 8) / 16}
    found = object_places(batch, NAMES, "observation.images.image2", WHOLE, "places")
    assert torch.equal(found, torch.tensor([[4.0, 5], [12, 13]]) / 16)
    assert object_places(batch, NAMES, "observation.images.wrist", WHOLE, "places") is None
    assert object_places({}, NAMES, "observation.images.image2", WHOLE, "places") is None


def test_places_are_of_what_the_tower_sees():
    batch = {"places": torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.5, 1.1, 0.0, 0.0]])}
    found = object_places(batch, NAMES[:4], "observation.images.image", (0.0, 0.25, 1.0, 0.75), "places")
    assert torch.equal(found, torch.tensor([[0.5, 0.5], [0.0, 0.75], [-1.0, -1.0]]))
