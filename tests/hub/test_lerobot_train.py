"""`lerobot-train --policy.push_to_hub=true`, run in this process."""

import json
import sys
from getpass import getuser

import pytest
import torch
import yaml

from comparing import act
from lerobot_grids.hub.pull import pull
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint.manifest import verify_manifest
from lerobot_policy_grids.errors import GridsError, HubError
from loopback_endpoints import TOKEN

REPO = "me/trained"


@pytest.fixture
def lerobot_train(hub, dataset, tmp_path, monkeypatch):
    """Two steps, then the push; returns the run's last checkpoint."""
    from lerobot.scripts import lerobot_train as script

    monkeypatch.setattr(script, "init_logging", lambda **options: None)

    def run(*arguments):
        flags = {
            "dataset.repo_id": "local/squares",
            "dataset.root": dataset,
            "output_dir": tmp_path / "run",
            "policy.device": "cpu",
            "policy.push_to_hub": "true",
            "policy.repo_id": REPO,
            "steps": 2,
            "batch_size": 4,
            "num_workers": 0,
            "env_eval_freq": 0,
            "wandb.enable": "false",
        }
        command = ["lerobot-train", *(f"--{name}={value}" for name, value in flags.items()), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        script.train()
        return tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"

    return run


FRESH = ("--policy.type=grids", "--policy.base.type=tiny_smolvla", "--policy.num_tokens=9")


def test_what_arrives_is_the_policy_whole_and_in_one_commit(hub, lerobot_train, tmp_path, caplog):
    caplog.set_level("INFO")
    hub.add(REPO, {"train_config.json": b"{}", "grids_adapter.safetensors": b"old", "notes.txt": b"kept"})
    checkpoint = lerobot_train(*FRESH, "--policy.tags=[squares]", "--policy.license=mit")
    # LeRobot waits for this line of a remote job.
    assert f"Model pushed to {hub.url}/{REPO}" in caplog.messages
    repository = hub.repositories[REPO]
    assert [commit.message.partition(",")[0] for commit in repository.commits[1:]] == [
        "full checkpoint of lerobot-train"
    ]
    files = repository.commits[-1].files
    assert set(files) == {path.name for path in checkpoint.iterdir()} - {"train_config.json"} | {
        "README.md",
        "grids_manifest.json",
        "notes.txt",
    }
    everything = b"\n".join(files.values())
    for secret in (TOKEN, str(tmp_path), str(tmp_path.parent), f"/{getuser()}/"):
        assert secret.encode() not in everything
    metadata = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (metadata["library_name"], metadata["license"]) == ("lerobot", "mit")
    assert "squares" in metadata["tags"]
    assert "datasets" not in metadata

    expected = act(GridsPolicy.from_pretrained(checkpoint))
    assert torch.equal(act(GridsPolicy.from_pretrained(REPO)), expected)
    pull(REPO, tmp_path / "pulled")
    assert verify_manifest(tmp_path / "pulled").format == "full"
    assert torch.equal(act(GridsPolicy.from_pretrained(tmp_path / "pulled")), expected)


def test_without_a_checkpoint_it_is_whole_after_the_processors(hub, lerobot_train):
    hub.add(REPO, {"grids_manifest.json": b"{}", "policy_preprocessor.json": b"old"})
    lerobot_train(*FRESH, "--save_checkpoint=false")
    first, *_ = commits = hub.repositories[REPO].commits[1:]
    assert len(commits) == 3
    assert set(first.files) == {"README.md", "config.json", "model.safetensors"}
    assert "train_config.json" not in commits[-1].files
    assert GridsPolicy.from_pretrained(REPO).num_tokens == 9


def test_low_rank_adapters_are_merged(hub, lerobot_train, grids_checkpoint):
    lerobot_train(f"--policy.path={grids_checkpoint}", "--peft.method_type=LORA", "--peft.r=4", "--seed=1")
    files = hub.files(REPO)
    assert json.loads(files["config.json"])["use_peft"] is False
    assert not [name for name in files if name.startswith("adapter_")]
    before, after = GridsPolicy.from_pretrained(grids_checkpoint), GridsPolicy.from_pretrained(REPO)
    assert before.state_dict().keys() == after.state_dict().keys()
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert any(name.startswith("reducer.") for name in changed)
    assert any(name.startswith("base.") for name in changed)


def test_a_refused_push_is_said_and_nothing_arrives(hub, lerobot_train, monkeypatch):
    hub.add(REPO, {"README.md": b"mine"})
    with pytest.raises(HubError, match=f"{REPO} exists and is public"):
        lerobot_train(*FRESH, "--steps=1", "--policy.private=true")
    assert len(hub.repositories[REPO].commits) == 1


def test_paths_of_this_machine_stop_the_push(hub, lerobot_train, tmp_path):
    with pytest.raises(GridsError, match=r"README.md names /data/mine, a path of this machine"):
        lerobot_train(*FRESH, "--steps=1", "--policy.license=/data/mine")
    assert REPO not in hub.repositories
