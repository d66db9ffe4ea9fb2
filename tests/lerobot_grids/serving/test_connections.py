"""Robots that come and go, stand still, or lose the network; one acts at a time."""

import threading
import time

import numpy as np
import pytest
import torch

pytest.importorskip("grpc")

import grpc
from lerobot.transport import services_pb2

from lerobot_grids.serving import policy_server
from robot_caller import SOON_S, acts, in_process, is_admitted, refused, seen, wait_until
from slow_wire import slow_wire


def test_an_error_of_the_policy_reaches_the_robot_and_the_next_observation_acts(robot, loaded, monkeypatch, capsys):
    """LeRobot's server would be silent, and then leave out observations that are like the one that failed."""
    with monkeypatch.context() as patch:

        def fails(batch):
            raise RuntimeError("out of something\nand a stack of C++")

        patch.setattr(loaded.policy, "predict_action_chunk", fails)
        said = refused(robot.send(seen()).actions, code=grpc.StatusCode.INTERNAL)
        assert said == "no actions: RuntimeError: out of something"
    assert capsys.readouterr().err.count("out of something") == 1
    torch.manual_seed(0)
    assert torch.equal(robot.send(seen(), must_go=False).actions(), in_process(loaded))


def test_a_robot_that_stands_still_gets_actions_again_after_a_lost_answer(robot, server):
    """Its next observations are like the last, have the same number, and are not marked."""
    assert robot.send(seen()).actions() is not None
    assert robot.send(seen(), must_go=False).actions() is None
    time.sleep(server.config.obs_queue_timeout)
    assert robot.send(seen(), must_go=False).actions() is not None


def test_one_robot_at_a_time(caller, robot, loaded):
    acts(robot, loaded)
    other = caller()
    assert "another robot is served" in refused(other.ready, code=grpc.StatusCode.RESOURCE_EXHAUSTED)
    refused(other.send, seen(), code=grpc.StatusCode.RESOURCE_EXHAUSTED)
    acts(robot, loaded, timestep=1)


def test_a_robot_that_leaves_makes_room_at_once(caller, robot, loaded):
    """As LeRobot's client does, it leaves while it waits for actions."""
    waiting = robot.stub.GetActions.future(services_pb2.Empty())
    time.sleep(0.1)
    robot.channel.close()
    assert waiting.cancelled() or waiting.done()
    other = caller()
    wait_until(lambda: is_admitted(other))
    acts(other.instruct(), loaded)


def test_a_network_that_is_cut_in_the_middle(caller, endpoint, loaded, monkeypatch):
    monkeypatch.setattr(policy_server, "GONE_S", 0.5)
    with slow_wire(endpoint.address, 0.1) as wire:
        robot = caller(wire.address).ready().instruct()
        threading.Timer(0.15, wire.cut).start()
        start = time.monotonic()
        refused(robot.send, seen(top=noise(), wrist=noise()), code=grpc.StatusCode.UNAVAILABLE)
        assert time.monotonic() - start < SOON_S
    other = caller()
    wait_until(lambda: is_admitted(other))
    acts(other.instruct(), loaded)


def noise():
    return np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
