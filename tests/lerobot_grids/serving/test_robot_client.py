"""LeRobot's robot_client and our server on this machine: the robot gets the policy's actions, or is told why not."""

import logging
import threading

import pytest
import torch

pytest.importorskip("grpc")

from lerobot.async_inference import helpers
from lerobot.async_inference.configs import RobotClientConfig

from fake_robot import FakeRobot, FakeRobotConfig
from robot_caller import CAMERAS, JOINTS, SOON_S, TASK, in_process, wait_until
from slow_wire import slow_wire


@pytest.fixture(scope="module")
def client_module():
    """Without the log file that its import writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helpers, "get_logger", logging.getLogger)
        from lerobot.async_inference import robot_client
    return robot_client


@pytest.fixture
def client(client_module, endpoint, tmp_path):
    """A `RobotClient` with a robot that never moves."""
    made = []

    def make(address=None, views=CAMERAS, enough=3, **options):
        FakeRobot.sent.clear()
        config = FakeRobotConfig(
            id="x",
            calibration_dir=tmp_path,
            positions={name.removesuffix(".pos"): value for name, value in JOINTS.items()},
            views={name: [96, 96, value] for name, value in views.items()},
            enough=enough,
        )
        flags = {"policy_type": "grids", "pretrained_name_or_path": "served", "actions_per_chunk": 16} | options
        made.append(
            client_module.RobotClient(
                RobotClientConfig(robot=config, server_address=address or endpoint.address, task=TASK, **flags)
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.stop()


def control(client):
    """Let it act until the robot has had enough, as LeRobot's command does; returns what the robot was sent."""
    receiver = threading.Thread(target=client.receive_actions, daemon=True)
    receiver.start()
    with pytest.raises(KeyboardInterrupt):
        client.control_loop(task=TASK)
    return list(FakeRobot.sent)


@pytest.mark.parametrize("wire", [False, True], ids=["direct", "slow network"])
def test_lerobots_client_gets_the_policys_actions(client, endpoint, loaded, wire):
    expected = in_process(loaded, seed=7)
    # While the first chunk is on a slow wire, the client may ask for a second, of other noise, and mixes it in later.
    enough = 1 if wire else 3
    with slow_wire(endpoint.address, 0.05) as slow:
        one = client(slow.address if wire else None, enough=enough)
        assert one.start()
        torch.manual_seed(7)
        sent = control(one)
    assert [list(action) for action in sent] == [list(JOINTS)] * enough
    assert torch.equal(torch.tensor([list(action.values()) for action in sent]), expected[:enough])


def test_lerobots_client_is_told_of_a_wrong_camera(client, caplog):
    assert not client(views={"front": 40}).start()
    assert "the policy looks through cameras top, wrist; the robot has front" in caplog.text
    assert FakeRobot.sent == []


def test_lerobots_client_is_told_when_the_server_dies(client, endpoint, caplog):
    """It plays what it has, is told, and stays where it is; it hangs nowhere."""
    one = client(enough=1000)
    assert one.start()
    loops = [threading.Thread(target=one.receive_actions, daemon=True)]
    loops += [threading.Thread(target=one.control_loop, args=(TASK,), daemon=True)]
    for loop in loops:
        loop.start()
    wait_until(lambda: FakeRobot.sent)
    endpoint.server.stop(0).wait()
    wait_until(lambda: "Error receiving actions" in caplog.text and "Error sending observation" in caplog.text)
    wait_until(lambda: one.action_queue.empty())
    one.shutdown_event.set()
    for loop in loops:
        loop.join(SOON_S)
        assert not loop.is_alive()
