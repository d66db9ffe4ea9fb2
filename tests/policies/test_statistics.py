"""Joints that never moved: LeRobot's statistics of them are rounding, which normalisation would blow up."""

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets.compute_stats import get_feature_stats

from lerobot_policy_grids import TinySmolVLAConfig
from lerobot_policy_grids.checkpoint.statistics import settle_constants
from lerobot_policy_grids.processor_grids import make_processors

CONSTANTS = np.array([13.37, 1000.1, 179.07, 2.0], np.float32)


@pytest.fixture(params=[12, 300, 5000, 50000])
def recorded(request):
    """(Values [frames, 5], LeRobot's statistics of them); the last joint moves."""
    moving = np.random.default_rng(0).normal(size=(request.param, 1)).astype(np.float32)
    values = np.concatenate([np.tile(CONSTANTS, (request.param, 1)), moving], 1)
    return values, get_feature_stats(values, axis=0, keepdims=False)


def test_a_constant_joint_is_zero_for_the_policy_and_exact_for_the_robot(recorded):
    values, statistics = recorded
    config = TinySmolVLAConfig(device="cpu")
    config.input_features = {"observation.state": PolicyFeature(FeatureType.STATE, (5,))}
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (5,))}
    pre, post = make_processors(config, {"action": statistics, "observation.state": statistics})
    frame = torch.tensor(values[:1])
    seen = pre({"action": frame, "observation.state": frame[0], "task": "push"})
    for name in ("action", "observation.state"):
        assert torch.equal(seen[name][0, :4], torch.zeros(4)), name
    assert torch.equal(post(torch.randn(1, 5))[0, :4], frame[0, :4])


def test_a_joint_that_moves_keeps_its_statistics(recorded):
    _, statistics = recorded
    settled = settle_constants({"action": statistics})["action"]
    for kind, value in statistics.items():
        assert settled[kind][-1] == value[-1], kind


def test_images_and_incomplete_statistics_stay():
    statistics = {"image": {"min": np.zeros((3, 1, 1)), "max": np.zeros((3, 1, 1)), "mean": 1}, "action": {"mean": 3}}
    assert settle_constants(statistics) == statistics
