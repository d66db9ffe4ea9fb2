"""A Hub on this machine, an empty cache, and a policy trained from a base that lies there."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from comparing import BASE
from loopback_endpoints import TOKEN
from loopback_hub import LoopbackHub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub that the client in this process talks to, logged in."""
    with LoopbackHub().running() as server:
        # What the environment says is read when the client is imported.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="session")
def trained_once(dataset, dense_checkpoint, tmp_path_factory) -> Path:
    """As if BASE had been fetched, wrapped, and its reducer trained."""
    from lerobot_grids.data import load_metadata
    from lerobot_grids.policies import start

    commit = LoopbackHub().add_folder(BASE, dense_checkpoint)
    snapshot = tmp_path_factory.mktemp("cache") / "models--lab--dense" / "snapshots" / commit
    shutil.copytree(dense_checkpoint, snapshot)
    torch.manual_seed(1)
    reducer = {"type": "grids", "num_tokens_max": 36}
    built = start(str(snapshot), 16, load_metadata(str(dataset)), reducer=reducer)
    for parameter in built.policy.reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("trained")
    built.save(folder)
    return folder


@pytest.fixture
def trained(hub, dense_checkpoint, trained_once, tmp_path) -> Path:
    """A grids checkpoint whose base is BASE on the Hub, and of which only the reducer was trained."""
    hub.add_folder(BASE, dense_checkpoint)
    return Path(shutil.copytree(trained_once, tmp_path / "run" / "pretrained_model"))
