"""A run that starts from the Hub and ends there."""

import pytest
from safetensors.torch import load_file

from comparing import BASE
from lerobot_grids.evaluation import load_policy
from lerobot_grids_cli.fit_lightning import fit
from lerobot_policy_grids.errors import GridsError, HubError
from lerobot_policy_grids.manifest import read_manifest

REPO, SECOND = "me/first", "me/second"


@pytest.fixture
def train(dataset, tmp_path):
    """Two steps of the reducer alone."""

    def run(policy, push, **options):
        output = tmp_path / push.replace("/", "-")
        flags = {"dataset": dataset, "policy": policy, "push": push, "output": output, "steps": 2, "batch_size": 4}
        flags |= {"model.train": "reducer", "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"}
        fit([f"--{name}={value}" for name, value in (flags | options).items()])
        return output

    return run


def test_what_was_trained_is_pushed_and_can_be_trained_on(hub, dense_checkpoint, train, capsys):
    hub.add_folder(BASE, dense_checkpoint)
    train(BASE, REPO, tokens=16)
    commit = hub.repositories[REPO].commits[-1].oid
    assert f"pushed adapter checkpoint to {REPO}@{commit}" in capsys.readouterr().out
    card = hub.files(REPO)["README.md"].decode()
    assert f"base_model: {BASE}" in card
    assert "| steps | 2 |" in card
    assert "datasets" not in card.split("---")[1]  # it is a folder here
    # What was pushed is where the next run starts, with the same dense base under it.
    output = train(REPO, SECOND)
    assert load_policy(SECOND).policy.num_tokens == 16
    base = read_manifest(load_folder(hub, SECOND, output)).base
    assert (base.repo_id, base.revision) == (BASE, hub.repositories[BASE].commits[0].oid)


def load_folder(hub, name, folder):
    (folder / "seen").mkdir()
    for path, data in hub.files(name).items():
        (folder / "seen" / path).write_bytes(data)
    return folder / "seen"


def test_a_failed_push_keeps_the_policy_and_says_how_to_push_it(hub, dense_checkpoint, train, tmp_path):
    hub.add_folder(BASE, dense_checkpoint)
    hub.fail("POST", "/commit/", 500, 9)
    with pytest.raises(
        GridsError, match=r"answered 500.*the policy is saved, push it with lerobot-grids push .* me/first"
    ):
        train(BASE, REPO, tokens=4)
    assert load_file(tmp_path / "me-first" / "pretrained_model" / "model.safetensors")


@pytest.mark.parametrize(("repository", "message"), [("nowhere", "is no repository"), (REPO, "hf auth login")])
def test_what_cannot_be_pushed_is_said_before_training(hub, train, monkeypatch, tmp_path, repository, message):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match=message):
        train("tiny", repository, tokens=4)
    assert not list(tmp_path.glob("me-*"))
