"""A robot that calls our server, and may do what LeRobot's client does not: what it sees, and what it gets."""

import pickle
import time

import grpc
import numpy as np
import pytest
import torch
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import send_bytes_in_chunks

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


def wait_until(happened):
    end = time.monotonic() + SOON_S
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_admitted(caller):
    try:
        caller.ready()
    except grpc.RpcError:
        return False
    return True
