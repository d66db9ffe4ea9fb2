"""A robot that does not fit the policy is told so, and a wrong observation is refused."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("grpc")

import grpc
from lerobot.configs import PolicyFeature

from lerobot_grids.serving.robots import mock_robot
from lerobot_policy_grids.errors import GridsError
from robot_caller import IMAGE, JOINTS, TASK, acts, features, refused, seen


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (features({"top": 0, "front": 0}), {}, "the robot has top, front. Name the robot's cameras so"),
        (features({}), {}, "the robot has none"),
        (features(joints=list("abc")), {}, "trained with 4 joints, the robot has 3 (a, b, c)"),
        ({k: v for k, v in features().items() if "images" in k}, {}, "which the robot does not send"),
        (features() | {"observation.images.top": {"shape": (96, 96, 1)}}, {}, "expected (height, width, 3)"),
        (features() | {"observation.images.top": "top"}, {}, "expected a shape of positive numbers"),
        (features(), {"kind": "act"}, "give robot_client --policy_type=grids"),
        (features(), {"count": 17}, "--actions_per_chunk from 1 to 16"),
        (features(), {"count": 0}, "--actions_per_chunk from 1 to 16"),
        (features(), {"rename_map": {"a": "b"}}, "give it to serve"),
    ],
)
def test_a_robot_that_does_not_fit_is_told(caller, loaded, given, options, message):
    one = caller().ready()
    said = refused(one.instruct, given, code=grpc.StatusCode.FAILED_PRECONDITION, **options)
    assert message in said
    # It has no instructions, so it gets no actions either.
    refused(one.send, seen(), code=grpc.StatusCode.FAILED_PRECONDITION)
    acts(one.ready().instruct(), loaded)


def test_a_robot_whose_joints_are_in_another_order(caller, loaded, monkeypatch):
    """LeRobot's client sends actions by their position."""
    config = loaded.policy.config.base
    monkeypatch.setattr(config, "action_feature_names", list(JOINTS), raising=False)
    other = features(joints=list(reversed(JOINTS)))
    said = refused(caller().ready().instruct, other, code=grpc.StatusCode.FAILED_PRECONDITION)
    assert "in another order" in said


def test_a_robot_with_more_cameras_or_another_shape_is_served_with_a_warning(caller, loaded, capsys):
    wide = IMAGE | {"shape": (96, 192, 3)}
    given = features() | {"observation.images.top": wide, "observation.images.third": IMAGE}
    one = caller().ready().instruct(given)
    error = capsys.readouterr().err
    assert "does not look through observation.images.third" in error
    assert "sends 192 x 96 pixels and the policy learnt from 96 x 96" in error
    assert one.send(seen(top=np.zeros((96, 192, 3), np.uint8))).actions().shape == (16, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top": None}, "camera top sent NoneType"),
        ({"top": np.zeros((96, 95, 3), np.uint8)}, "camera top sent (96, 95, 3)"),
        ({"top": np.zeros((96, 96, 3), np.float32)}, "expected uint8"),
        ({"b.pos": float("nan")}, "joint b.pos is nan"),
        ({"b.pos": "left"}, "joint b.pos is left"),
    ],
)
def test_a_wrong_observation_is_refused_and_the_next_one_acts(robot, loaded, changed, message):
    assert message in refused(robot.send, seen(**changed))
    acts(robot, loaded)


def test_a_camera_that_no_robot_can_have_is_refused_before_it_serves(loaded):
    """LeRobot calls cameras observation.images.NAME."""
    config = SimpleNamespace(image_features={"observation.image": PolicyFeature("VISUAL", (3, 96, 96))})
    policy = SimpleNamespace(policy=SimpleNamespace(config=config), renames={})
    with pytest.raises(
        GridsError, match=re.escape('--rename_map \'{"observation.images.NAME": "observation.image"}\'')
    ):
        mock_robot(policy, TASK)
