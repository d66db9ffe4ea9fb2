"""Policies that `lerobot-train` trains: LeRobot's own push is refused, ours takes its checkpoint."""

import sys
from getpass import getuser

import pytest
import torch

from comparing import act
from lerobot_grids.hub.pull import pull
from lerobot_grids.hub.push import push
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint.manifest import verify_manifest
from lerobot_policy_grids.errors import GridsError
from loopback_endpoints import TOKEN

REPO = "me/trained"
FRESH = ("--policy.type=grids", "--policy.base.type=tiny_smolvla", "--policy.num_tokens=9")


@pytest.fixture
def lerobot_train(hub, dataset, tmp_path, monkeypatch):
    """Two steps; returns the run's last checkpoint."""
    from lerobot.scripts import lerobot_train as script

    monkeypatch.setattr(script, "init_logging", lambda **options: None)

    def run(*arguments):
        flags = {
            "dataset.repo_id": "local/squares",
            "dataset.root": dataset,
            "output_dir": tmp_path / "run",
            "policy.device": "cpu",
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


@pytest.mark.parametrize(
    "flags",
    [["--policy.push_to_hub=true"], ["--policy.push_to_hub=false", "--save_checkpoint_to_hub=true"]],
    ids=["push_to_hub", "save_checkpoint_to_hub"],
)
def test_lerobots_push_is_refused_before_training(flags, hub, lerobot_train, tmp_path, capfd):
    """It would send train_config.json, which holds paths of this machine."""
    with pytest.raises((SystemExit, GridsError)) as refused:
        lerobot_train(*FRESH, f"--policy.repo_id={REPO}", *flags)
    said = f"{refused.value} {capfd.readouterr().err}"
    assert "push with: lerobot-grids push RUN/checkpoints/last/pretrained_model" in said
    assert not (tmp_path / "run").exists()
    assert REPO not in hub.repositories


def test_a_push_in_python_is_refused(grids_checkpoint):
    with pytest.raises(GridsError, match="lerobot-grids push"):
        GridsPolicy.from_pretrained(grids_checkpoint).push_model_to_hub(None)


def test_our_push_sends_the_policy_whole_and_in_one_commit(hub, lerobot_train, tmp_path):
    hub.add(REPO, {"train_config.json": b"{}", "grids_adapter.safetensors": b"old", "notes.txt": b"kept"})
    checkpoint = lerobot_train(*FRESH, "--policy.push_to_hub=false")
    push(checkpoint, REPO)
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2
    files = repository.commits[-1].files
    ours = {"README.md", "grids_manifest.json", "notes.txt"}
    assert set(files) == {path.name for path in checkpoint.iterdir()} - {"train_config.json"} | ours
    everything = b"\n".join(files.values())
    for secret in (TOKEN, str(tmp_path), str(tmp_path.parent), f"/{getuser()}/"):
        assert secret.encode() not in everything
    expected = act(GridsPolicy.from_pretrained(checkpoint))
    assert torch.equal(act(GridsPolicy.from_pretrained(REPO)), expected)
    pull(REPO, tmp_path / "pulled")
    assert verify_manifest(tmp_path / "pulled").format == "full"
    assert torch.equal(act(GridsPolicy.from_pretrained(tmp_path / "pulled")), expected)
