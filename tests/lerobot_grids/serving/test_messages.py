"""What anybody may send: only a robot's messages are read, nothing in them runs, and the server goes on."""

import os
import pickle
import threading
import time

import numpy as np
import pytest

pytest.importorskip("grpc")

import grpc
from lerobot.async_inference.helpers import TimedObservation
from lerobot.transport import services_pb2
from lerobot.transport.utils import send_bytes_in_chunks

from lerobot_grids.serving import policy_server, unpickling
from robot_caller import SOON_S, acts, refused, seen


class Evil:
    """Its pickle runs a command where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def changes_a_class():
    """A pickle that sets attributes of a class that it may name."""
    return b"\x80\x04clerobot.async_inference.helpers\nTimedObservation\nN}X\x0c\0\0\0get_timestepK\x05s\x86b."


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps({"a": 1}), pickle.dumps(3), changes_a_class()])
def test_garbage_is_refused_and_the_server_goes_on(robot, loaded, data):
    part = services_pb2.Observation(transfer_state=3, data=data)
    assert "an observation is refused" in refused(robot.upload, iter([part]))
    assert "instructions are refused" in refused(robot.send_instructions, data)
    acts(robot, loaded)


def test_a_message_changes_no_class(robot, loaded, monkeypatch):
    """With Python's own unpickler this one would break every later observation."""
    monkeypatch.setattr(TimedObservation, "get_timestep", TimedObservation.get_timestep, raising=False)
    before = TimedObservation.get_timestep
    pickle.loads(changes_a_class())
    assert TimedObservation.get_timestep == 5
    TimedObservation.get_timestep = before
    with pytest.raises(unpickling.MessageError):
        unpickling.loads(changes_a_class())
    assert TimedObservation.get_timestep is before
    acts(robot, loaded)


def test_a_message_runs_nothing(robot, loaded, tmp_path):
    path = tmp_path / "ran"
    for data in (pickle.dumps(Evil(path)), pickle.dumps(TimedObservation(0.0, 0, {"a": Evil(path)}))):
        assert "system, which is not taken from a robot" in refused(
            robot.upload, send_bytes_in_chunks(data, services_pb2.Observation)
        )
        assert "system" in refused(robot.send_instructions, data)
    assert not path.exists()
    acts(robot, loaded)


@pytest.mark.parametrize("protocol", [4, 5])
def test_what_lerobots_client_sends_is_read(protocol):
    """By the protocols of every Python that LeRobot runs on."""
    sent = seen(b=np.float32(0.5), c=np.asfortranarray(np.ones((2, 3))))
    read = unpickling.loads(pickle.dumps(TimedObservation(1.5, 3, sent, True), protocol))
    assert (read.get_timestamp(), read.get_timestep(), read.must_go) == (1.5, 3, True)
    assert type(read) is TimedObservation
    assert read.get_observation().keys() == sent.keys()
    for name, value in sent.items():
        np.testing.assert_array_equal(read.get_observation()[name], value)


@pytest.mark.parametrize("name", ["multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer"])
def test_the_robot_may_have_another_numpy(name):
    """NumPy 2 calls its inner modules otherwise than NumPy 1."""
    allowed = unpickling._allowed()
    module, _, function = name.partition(".")
    assert {(f"numpy.core.{module}", function), (f"numpy._core.{module}", function)} <= allowed.keys()


def test_an_upload_that_never_ends(robot, loaded, monkeypatch):
    monkeypatch.setattr(policy_server, "UPLOAD_S", 0.2)
    end = threading.Event()

    def parts():
        yield services_pb2.Observation(transfer_state=1, data=b"x")
        end.wait(SOON_S)

    start = time.monotonic()
    refused(robot.upload, parts(), code=grpc.StatusCode.CANCELLED)
    end.set()
    assert time.monotonic() - start < SOON_S
    acts(robot, loaded)


def test_an_upload_without_end_in_bytes_or_cut_short(robot, loaded, monkeypatch):
    monkeypatch.setattr(policy_server, "LARGEST_UPLOAD", 1000)
    big = services_pb2.Observation(transfer_state=2, data=bytes(600))
    assert "more than" in refused(robot.upload, iter([big] * 50))
    assert "ended before it was whole" in refused(robot.upload, iter([big]))
    monkeypatch.undo()
    acts(robot, loaded)
