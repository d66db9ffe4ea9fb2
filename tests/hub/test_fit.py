"""A run that starts from the Hub and ends there."""

import re

import pytest
from safetensors.torch import load_file

from comparing import BASE, assert_same_bits
from lerobot_grids.policies import load
from lerobot_grids_cli.fit_lightning import fit
from lerobot_grids_cli.messages import OptionError
from lerobot_policy_grids.checkpoint.manifest import read_manifest
from lerobot_policy_grids.errors import GridsError, HubError

REPO, SECOND = "me/first", "me/second"


@pytest.fixture
def train(dataset, tmp_path):
    """Two steps of the reducer alone."""

    def run(policy, push=None, **options):
        output = tmp_path / (push or "not pushed").replace("/", "-")
        flags = {"dataset": dataset, "policy": policy, "output": output, "steps": 2, "batch_size": 4}
        flags |= {"push": push} if push else {}
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
    assert load(SECOND).policy.num_tokens == 16
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


@pytest.mark.parametrize(
    ("repository", "message"), [("nowhere", "is not the name of a repository"), (REPO, "hf auth login")]
)
def test_what_cannot_be_pushed_is_said_before_training(hub, train, monkeypatch, tmp_path, repository, message):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match=message):
        train("tiny", repository, tokens=4)
    assert not list(tmp_path.glob("me-*"))


def test_every_so_many_steps_what_was_saved_is_pushed(hub, dense_checkpoint, train, capsys):
    hub.add_folder(BASE, dense_checkpoint)
    options = {"tokens": 16, "steps": 5, "save_every": 1, "trainer.accumulate_grad_batches": 2}
    output = train(BASE, REPO, push_every=2, **options)
    printed = capsys.readouterr().out
    commits = hub.repositories[REPO].commits[1:]
    assert [re.sub(", lerobot-grids.*", "", commit.message) for commit in commits] == [
        "adapter checkpoint of step 2",
        "adapter checkpoint of step 4",
        "adapter checkpoint",
    ]
    assert [line for line in printed.splitlines() if line.startswith("pushed step")] == [
        f"pushed step {step} to {REPO}@{commit.oid}" for step, commit in zip((2, 4), commits, strict=False)
    ]
    cards = [commit.files["README.md"].decode() for commit in commits]
    assert "| saved at step | 2 |" in cards[0]
    assert "saved at step" not in cards[2]
    assert len({commit.files["grids_adapter.safetensors"] for commit in commits}) == 3
    # The policies that were built for the pushes drew random numbers, but none of the training.
    alone = train(BASE, **options)
    weights = [load_file(folder / "pretrained_model" / "model.safetensors") for folder in (output, alone)]
    assert_same_bits(*weights)


def test_a_last_step_that_is_a_multiple_is_pushed_once(hub, train, capsys):
    train("tiny", REPO, tokens=4, save_every=2, push_every=2)
    assert "pushed step" not in capsys.readouterr().out
    assert len(hub.repositories[REPO].commits) == 2


def test_a_failed_push_on_the_way_is_a_line(hub, train, capsys):
    hub.fail("POST", "/commit/", 403)
    train("tiny", REPO, tokens=4, steps=3, save_every=1, push_every=1)
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "warning" in line]
    assert line.startswith(
        f"warning: step 1 was not pushed to {REPO}: {REPO} cannot be pushed to: your token has no permission"
    )
    assert line.endswith("training continues, the next push is after 1 steps or at the end")
    assert "pushed step 2" in printed.out
    assert "pushed full checkpoint" in printed.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_every": 500}, "--push_every 500 without --push; give --push user/name"),
        ({"push": REPO, "push_every": 750}, "--push_every 750 with --save_every 500: .* give a multiple"),
        ({"push": REPO, "push_every": 0}, "--push_every 0; give at least 1"),
    ],
)
def test_a_push_that_cannot_be_done_as_asked_is_refused(hub, train, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        train("tiny", tokens=4, **options)
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]
