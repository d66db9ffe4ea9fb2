"""LeRobot's robot_client and our server on this machine: the robot gets the policy's actions, or is told why not."""

import json
import logging
import os
import pickle
import re
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("grpc")

import grpc
from lerobot.async_inference import helpers
from lerobot.async_inference.configs import RobotClientConfig
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.configs import PolicyFeature
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import send_bytes_in_chunks

from fake_robot import FakeRobot, FakeRobotConfig
from lerobot_grids.data import load_metadata
from lerobot_grids.policies import load, start
from lerobot_grids.serving import GridsPolicyServer, is_loopback, policy_server, start_server, unpickling
from lerobot_grids.serving.robots import mock_robot
from lerobot_grids_cli.main import main
from lerobot_policy_grids.errors import GridsError
from slow_wire import slow_wire

JOINTS = {"a.pos": 0.1, "b.pos": 0.2, "c.pos": 0.3, "d.pos": 1.0}
CAMERAS = {"top": 40, "wrist": 200}
TASK = "push the square to the goal"
IMAGE = {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channels"]}
# Nothing takes longer than this, however busy the machine is.
SOON_S = 20.0


def state_of(names):
    return {"dtype": "float32", "shape": (len(names),), "names": list(names)}


def features(cameras=CAMERAS, joints=JOINTS):
    """What LeRobot's client says of its robot."""
    images = {f"observation.images.{name}": IMAGE for name in cameras}
    return {"observation.state": state_of(joints)} | images


def seen(**changed):
    """What the robot sees."""
    pictures = {name: np.full((96, 96, 3), value, np.uint8) for name, value in CAMERAS.items()}
    return JOINTS | pictures | {"task": TASK} | changed


@pytest.fixture(scope="module")
def checkpoint(two_camera_dataset, tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("served")
    built = start("tiny", 16, load_metadata(str(two_camera_dataset)), reducer={"type": "grids", "num_tokens_max": 36})
    for parameter in built.policy.reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    built.save(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint, device="cpu")


@pytest.fixture
def server(loaded):
    return GridsPolicyServer(loaded, "served", queue_timeout_s=0.3)


@pytest.fixture
def endpoint(server):
    running = start_server(server, "127.0.0.1", 0)
    yield running
    running.server.stop(0).wait()


class Caller:
    """A client that can also do what LeRobot's does not."""

    def __init__(self, address):
        # Otherwise grpc would give two clients of this process one connection.
        self.channel = grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self.stub = services_pb2_grpc.AsyncInferenceStub(self.channel)

    def ready(self):
        self.stub.Ready(services_pb2.Empty(), timeout=SOON_S)
        return self

    def instruct(self, given=None, *, kind="grids", count=16, **options):
        specs = RemotePolicyConfig(kind, "served", features() if given is None else given, count, **options)
        return self.send_instructions(pickle.dumps(specs))

    def send_instructions(self, data):
        self.stub.SendPolicyInstructions(services_pb2.PolicySetup(data=data), timeout=SOON_S)
        return self

    def send(self, observation, timestep=0, must_go=True):
        message = TimedObservation(time.time(), timestep, observation, must_go)
        return self.upload(send_bytes_in_chunks(pickle.dumps(message), services_pb2.Observation))

    def upload(self, parts):
        self.stub.SendObservations(parts, timeout=SOON_S)
        return self

    def actions(self):
        data = self.stub.GetActions(services_pb2.Empty(), timeout=SOON_S).data
        return torch.stack([action.get_action() for action in pickle.loads(data)]) if data else None


@pytest.fixture
def caller(endpoint):
    made = []

    def connect(address=None):
        made.append(Caller(address or endpoint.address))
        return made[-1]

    yield connect
    for one in made:
        one.channel.close()


@pytest.fixture
def robot(caller):
    """One that fits."""
    return caller().ready().instruct()


def in_process(loaded, seed=0):
    """The policy's own actions [t, a], of the batch that a recorded frame would give."""
    batch = {
        f"observation.images.{name}": torch.full((1, 3, 96, 96), value, dtype=torch.uint8).float() / 255
        for name, value in CAMERAS.items()
    }
    batch |= {"observation.state": torch.tensor([list(JOINTS.values())]), "task": [TASK]}
    torch.manual_seed(seed)
    return loaded.postprocessor(loaded.policy.predict_action_chunk(loaded.preprocessor(batch)))[0]


def refused(call, *arguments, code=grpc.StatusCode.INVALID_ARGUMENT, **options):
    """Call; expect to be refused, and return what the server says."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **options)
    assert caught.value.code() is code, caught.value.details()
    return caught.value.details()


def acts(robot, loaded, timestep=0):
    """The server works: it gives this robot the policy's actions."""
    torch.manual_seed(0)
    actions = robot.send(seen(), timestep).actions()
    assert torch.equal(actions, in_process(loaded))


# LeRobot's own client.


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
    with slow_wire(endpoint.address, 0.05) as slow:
        one = client(slow.address if wire else None)
        assert one.start()
        torch.manual_seed(7)
        sent = control(one)
    assert [list(action) for action in sent] == [list(JOINTS)] * 3
    assert torch.equal(torch.tensor([list(action.values()) for action in sent]), expected[:3])


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


def wait_until(happened):
    end = time.monotonic() + SOON_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


# Whoever else connects.


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


def is_admitted(caller):
    try:
        caller.ready()
    except grpc.RpcError:
        return False
    return True


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


# The command.


def test_addresses():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.0.2", "::", "robot.local")))


def test_a_port_that_is_taken(server, endpoint):
    with pytest.raises(GridsError, match="another program may have the port"):
        start_server(server, "127.0.0.1", int(endpoint.address.rpartition(":")[2]))


def test_dry_run(checkpoint, tmp_path, capsys):
    file = tmp_path / "dry.json"
    flags = ["--dry_run", "--requests=2", "--tokens=4", "--runtime=fast", "--device=cpu", f"--json={file}"]
    assert main(["serve", str(checkpoint), *flags]) == 0
    out = capsys.readouterr().out
    assert "4 of 144 visual tokens per camera" in out
    assert "which nothing was moved by" in out
    result = json.loads(file.read_text())
    assert (np.shape(result["actions"]), result["requests"]) == ((16, 4), 2)
    assert 0 < result["policy_ms"][0] <= result["server_ms"][0] <= result["round_trip_ms"][0]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_serve_until_ctrl_c(checkpoint, tmp_path, capsys, monkeypatch, host):
    from lerobot_grids import serving

    listening = []

    def start_and_press(servicer, *address):
        endpoint = start_server(servicer, "127.0.0.1", 0)
        robot = Caller(endpoint.address).ready().instruct()
        listening.append((address, robot.send(seen()).actions()))

        def press():
            raise KeyboardInterrupt

        monkeypatch.setattr(endpoint.server, "wait_for_termination", press)
        return endpoint

    monkeypatch.setattr(serving, "start_server", start_and_press)
    file = tmp_path / "served.json"
    assert main(["serve", str(checkpoint), f"--host={host}", "--port=0", "--device=cpu", f"--json={file}"]) == 0
    ((address, actions),) = listening
    assert (address, actions.shape) == ((host, 0), (16, 4))
    out = capsys.readouterr().out
    assert ("without a login" in out) == (host == "0.0.0.0")
    assert "--policy_type=grids" in out
    assert "served 1 action chunks" in out
    assert json.loads(file.read_text())["chunks"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--port=70000"], "--port 70000"), (["--tokens=99"], "1 .. 36"), (["--runtime=fest"], "eager, fast")],
)
def test_serve_refuses(checkpoint, capsys, flags, message):
    # What the parser refuses ends the program.
    with pytest.raises(SystemExit) as stop:
        sys.exit(main(["serve", str(checkpoint), *flags]))
    assert stop.value.code in (1, 2)
    assert message in capsys.readouterr().err


def test_a_camera_that_no_robot_can_have_is_refused_before_it_serves(loaded):
    """LeRobot calls cameras observation.images.NAME."""
    config = SimpleNamespace(image_features={"observation.image": PolicyFeature("VISUAL", (3, 96, 96))})
    policy = SimpleNamespace(policy=SimpleNamespace(config=config), renames={})
    with pytest.raises(
        GridsError, match=re.escape('--rename_map \'{"observation.images.NAME": "observation.image"}\'')
    ):
        mock_robot(policy, TASK)
