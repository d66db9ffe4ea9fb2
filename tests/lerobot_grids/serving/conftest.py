"""A checkpoint that is served on this machine, and robots that connect to it.

Where grpc is not installed the tests are skipped, so nothing here imports it before a test asks for a server.
"""

import pytest
import torch

from lerobot_grids.data import load_metadata
from lerobot_grids.policies import load, start


@pytest.fixture(scope="session")
def checkpoint(two_camera_dataset, tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("served")
    built = start("tiny", 16, load_metadata(str(two_camera_dataset)), reducer={"type": "grids", "num_tokens_max": 36})
    for parameter in built.policy.reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    built.save(folder)
    return folder


@pytest.fixture(scope="session")
def loaded(checkpoint):
    return load(checkpoint, device="cpu")


@pytest.fixture
def server(loaded):
    from lerobot_grids.serving import GridsPolicyServer

    return GridsPolicyServer(loaded, "served", queue_timeout_s=0.3)


@pytest.fixture
def endpoint(server):
    from lerobot_grids.serving import start_server

    running = start_server(server, "127.0.0.1", 0)
    yield running
    running.server.stop(0).wait()


@pytest.fixture
def caller(endpoint):
    from robot_caller import Caller

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
