"""Repositories that mean harm."""

import json

import pytest
import torch
from safetensors.torch import load as read
from safetensors.torch import save

from lerobot_grids.hub.pull import pull
from lerobot_grids.hub.push import push
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.errors import CheckpointError
from published import ADAPTER, REPO


def test_a_repository_is_taken_by_its_names(hub, trained, tmp_path):
    push(trained, REPO)
    names = ("../../escape.json", "/etc/cron.d/x", "..\\x.json", ".git/config", "pytorch_model.bin", "a/config.json")
    repository = hub.repositories[REPO]
    repository.commit(repository.commits[-1].files | dict.fromkeys(names, b"evil"), "evil")
    pull(REPO, tmp_path / "deep" / "pulled")
    assert {path.name for path in (tmp_path / "deep" / "pulled").iterdir()} == ADAPTER
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


def test_what_is_too_large_is_not_fetched(hub, trained, tmp_path):
    push(trained, REPO)
    repository = hub.repositories[REPO]
    repository.commit(repository.commits[-1].files | {"config.json": b" " * (2**20 + 1)}, "large")
    hub.requests.clear()
    with pytest.raises(CheckpointError, match=r"config\.json has 1048577 bytes"):
        pull(REPO, tmp_path / "pulled")
    assert not [request for request in hub.requests if "resolve" in request]


POST_STATE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


def spoilt(value):
    return lambda data: save({name: torch.full_like(tensor, value) for name, tensor in read(data).items()})


@pytest.mark.parametrize("source", ["trained", "dense_checkpoint"])
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda data: data[:-100], "model.safetensors cannot be read"),
        (POST_STATE, lambda data: data[:-1], f"{POST_STATE} cannot be read"),
        (POST_STATE, spoilt(torch.nan), "of 'action' that is not finite"),
        (POST_STATE, spoilt(1e30), "of 'action' that is not finite"),
    ],
)
def test_tensors_that_nobody_could_load_are_not_pulled(hub, request, tmp_path, source, name, change, message):
    folder = request.getfixturevalue(source)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add(REPO, files | {name: change(files[name])})
    with pytest.raises(CheckpointError, match=f"^{REPO}/.*{message}"):
        pull(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("load", ["pull", "from_pretrained"])
def test_code_in_a_repository_is_not_run(hub, trained, tmp_path, load):
    push(trained, REPO)
    repository, marker = hub.repositories[REPO], tmp_path / "marker"
    files = dict(repository.commits[-1].files)
    content = json.loads(files["policy_preprocessor.json"])
    content["steps"].append({"class": "os.system", "config": {"command": f"touch {marker}"}})
    files["policy_preprocessor.json"] = json.dumps(content).encode()
    repository.commit(files, "evil")
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="can run code"):
        pull(REPO, tmp_path / "pulled") if load == "pull" else GridsPolicy.from_pretrained(REPO)
    assert not marker.exists()
    assert not (tmp_path / "pulled").exists()
    assert all(REPO in request for request in hub.requests)
