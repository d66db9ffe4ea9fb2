"""Fixtures shared by all tests. Everything runs on the CPU, offline, on data made here."""

import os

# Before anything imports torch, transformers or a Hub client.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Side by side with another worker, each has one core of a small machine. A worker inherits what its controller set.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools
import gc
import json
import signal
import sys
from importlib import import_module
from pathlib import Path

import docstring_parser
import draccus.wrappers.docstring
import numpy as np
import pytest
import torch
from huggingface_hub import constants

import installing

# Each command line reads the docstrings of all that it can set, for its help. The tests build hundreds of them.
for module, name in ((draccus.wrappers.docstring, "get_attribute_docstring"), (docstring_parser, "parse_from_object")):
    setattr(module, name, functools.cache(getattr(module, name)))

SIZE, EPISODES, FRAMES = 96, 6, 24


def pytest_collection_finish():
    """What is imported lives as long as the tests, so the garbage collector need not look at it again and again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory):
    """What is remembered of files stays out of the user's cache."""
    constants.HF_HOME = str(tmp_path_factory.mktemp("hf_home"))


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)


def write_dataset(root: Path, cameras=("observation.image",), positions=False, places=False) -> Path:
    """A LeRobotDataset of a bright square that an action moves: small, real, and learnable from the image."""
    import datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    datasets.disable_progress_bars()
    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": list("abcd")},
        "action": {"dtype": "float32", "shape": (4,), "names": list("abcd")},
    }
    image = {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    features |= dict.fromkeys(cameras, image)
    if positions:
        features["auxiliary.positions"] = {"dtype": "float32", "shape": (6,), "names": list("abcdef")}
    if places:
        names = [f"image_object_{axis}" for axis in "xy"]
        features["auxiliary.places"] = {"dtype": "float32", "shape": (2,), "names": names}
    dataset = LeRobotDataset.create("local/squares", fps=10, features=features, root=root, use_videos=False)
    random = np.random.default_rng(0)
    for episode in range(EPISODES):
        target, place = random.uniform(0.2, 0.8, 2), random.uniform(0.2, 0.8, 2)
        for _ in range(FRAMES):
            step = np.clip(target - place, -0.05, 0.05)
            pixels = np.full((SIZE, SIZE, 3), 40, np.uint8)
            for (x, y), colour in ((target, (0, 255, 0)), (place, (255, 0, 0))):
                column, row = int(x * SIZE), int(y * SIZE)
                pixels[row - 6 : row + 6, column - 6 : column + 6] = colour
            frame = dict.fromkeys(cameras, pixels)
            frame["observation.state"] = np.array([0.1 * episode, 0, 0, 1], np.float32)
            frame["action"] = np.array([*step * 20, 0, 0], np.float32)
            frame["task"] = ("move the red square", "push the square to the goal")[episode % 2]
            if positions:
                frame["auxiliary.positions"] = np.array([*place, 0, *target, 0], np.float32)
            if places:
                frame["auxiliary.places"] = place.astype(np.float32)
            dataset.add_frame(frame)
            place = place + step
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Two tasks, one camera, object positions."""
    return write_dataset(tmp_path_factory.mktemp("data") / "squares", positions=True)


@pytest.fixture(scope="session")
def placed_dataset(tmp_path_factory) -> Path:
    """One camera, and where it sees the object."""
    return write_dataset(tmp_path_factory.mktemp("data") / "placed", places=True)


@pytest.fixture(scope="session")
def two_camera_dataset(tmp_path_factory) -> Path:
    """Two cameras, no object positions."""
    cameras = ("observation.images.top", "observation.images.wrist")
    return write_dataset(tmp_path_factory.mktemp("data") / "two_cameras", cameras=cameras)


@pytest.fixture(scope="session")
def dense_checkpoint(dataset, tmp_path_factory) -> Path:
    """A dense tiny policy with random weights, saved as `fit --tokens dense` saves it."""
    from lerobot_grids.data import load_metadata
    from lerobot_grids.policies import start

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints") / "dense"
    folder.mkdir()
    start("tiny", "dense", load_metadata(str(dataset))).save(folder)
    return folder


@pytest.fixture(scope="session")
def grids_checkpoint(dataset, dense_checkpoint, tmp_path_factory) -> Path:
    """A grids policy around the dense checkpoint: 16 tokens, at most 36."""
    from lerobot_grids.data import load_metadata
    from lerobot_grids.policies import start

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("checkpoints") / "grids"
    folder.mkdir()
    reducer = {"type": "grids", "num_tokens_max": 36}
    built = start(str(dense_checkpoint), 16, load_metadata(str(dataset)), reducer=reducer)
    # Untrained offsets are zero; these let every path of the sampler matter.
    for parameter in built.policy.reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    built.save(folder)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    return installing.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """Commands of an environment with the wheel alone."""
    return installing.install(wheel, tmp_path_factory.mktemp("environment"))


@pytest.fixture
def lerobot(monkeypatch):
    """Run one of LeRobot's commands in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(name, **flags):
        script = import_module(f"lerobot.scripts.lerobot_{name}")
        monkeypatch.setattr(script, "init_logging", lambda **options: None)
        arguments = flags.pop("arguments", ())
        words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flags.items()]
        monkeypatch.setattr(sys, "argv", [f"lerobot-{name.replace('_', '-')}", *words, *arguments])
        return script.main()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
