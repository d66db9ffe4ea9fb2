"""Statistics of coordinates against closed formulas, and the warnings that follow from them."""

import math

import pytest
import torch

from lerobot_grids.coordinates import CoordinateStatistics
from lerobot_grids.training.callbacks import CoordinateMonitor
from lerobot_policy_grids.reducers.grid_sampler import GridSampler


def statistics_of(coordinates, anchors, grid=(12, 12)):
    measure = CoordinateStatistics(grid)
    measure.update(coordinates, anchors)
    return measure.compute()


def test_an_untrained_sampler_that_reads_every_cell():
    sampler = GridSampler((12, 12), 8, 144)
    sampled = sampler(torch.randn(2, 12, 12, 8))
    found = statistics_of(sampled.coordinates, sampler.anchors(144))
    assert found["border"] == found["duplicates"] == 0
    assert found["drift"] == pytest.approx(0, abs=1e-5)
    # Root of the variance of a uniform lattice of n points in two dimensions: 2 (n^2 - 1) / 12 cells squared.
    assert found["spread"] == pytest.approx(math.sqrt(2 * (144 - 1) / 12) / 12, rel=1e-5)


def test_anchors_belong_to_their_coordinates_row_by_row():
    sampler = GridSampler((6, 6), 8, 36)
    for k in (1, 5, 36):
        sampler.num_tokens = k
        torch.testing.assert_close(sampler(torch.randn(1, 6, 6, 8)).coordinates[0], sampler.anchors(k))


def test_collapse_saturation_and_drift_are_seen():
    anchors = torch.full((4, 2), 0.5)
    collapsed = torch.full((3, 4, 2), 0.5)
    collapsed[:, 3] = 0.9
    assert statistics_of(collapsed, anchors)["duplicates"] == pytest.approx(3 / 4)
    saturated = torch.tensor([[[0.0, 0.5], [1.0, 0.5], [0.5, 0.999], [0.5, 0.5]]])
    found = statistics_of(saturated, anchors)
    assert found["border"] == pytest.approx(3 / 4)
    assert found["drift"] == pytest.approx((6 + 6 + 12 * 0.499) / 4)


def test_motion_is_the_deviation_of_each_point_over_images():
    anchors, images = torch.rand(5, 2), 0.3 + 0.4 * torch.rand(7, 5, 2)
    measure = CoordinateStatistics((12, 12))
    for part in images.split(3):
        measure.update(part, anchors)
    expected = (12 * images).var(0, correction=0).sum(-1).sqrt().mean()
    assert measure.compute()["motion"] == pytest.approx(float(expected), rel=1e-4)
    assert statistics_of(images[:1].expand(4, -1, -1), anchors)["motion"] == pytest.approx(0, abs=1e-3)


def test_a_warning_comes_once(capsys):
    monitor = CoordinateMonitor()
    for _ in range(2):
        monitor._warn({"spread": 0.1, "border": 0.8, "duplicates": 0.2, "drift": 1.0})
    error = capsys.readouterr().err
    assert error.count("80 % of the points lie outside the outermost tokens") == 1
    assert "collapsed" not in error
