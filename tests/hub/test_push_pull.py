"""push -> pull -> act, on a Hub of this machine."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from comparing import BASE, act, assert_same_bits, state_of
from lerobot_grids.hub.pull import merge, pull
from lerobot_grids.hub.push import push
from lerobot_grids.policies import load
from lerobot_grids_cli import push as command
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint import digests
from lerobot_policy_grids.errors import CheckpointError, HubError
from published import ADAPTER, FULL, REPO, on_hub


@pytest.mark.parametrize(("format", "files"), [("adapter", ADAPTER), ("full", FULL), ("auto", ADAPTER)])
def test_what_was_pushed_acts_the_same_bit_for_bit(hub, trained, tmp_path, format, files):
    pushed = push(trained, REPO, format=format)
    assert on_hub(hub) == set(pushed.files) == files
    pulled = pull(REPO, tmp_path / "pulled")
    assert pulled.commit == pushed.commit == hub.repositories[REPO].commits[-1].oid
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == files
    expected = GridsPolicy.from_pretrained(trained)
    for source in (tmp_path / "pulled", REPO, f"{REPO}@{pushed.commit}"):
        policy = GridsPolicy.from_pretrained(source)
        assert_same_bits(state_of(policy), state_of(expected))
        assert torch.equal(act(policy), act(expected))
    assert [path.name for path in trained.parent.iterdir()] == ["pretrained_model"]


def test_a_dense_policy_is_pushed_whole(hub, dense_checkpoint, tmp_path):
    assert push(dense_checkpoint, REPO).format == "full"
    pull(REPO, tmp_path / "pulled")
    assert_same_bits(
        load_file(tmp_path / "pulled" / "model.safetensors"), load_file(dense_checkpoint / "model.safetensors")
    )


def test_an_adapter_that_saves_little_is_not_worth_its_base(hub, trained):
    tensors = load_file(trained / "model.safetensors")
    save_file({k: v + 0.001 if v.is_floating_point() else v for k, v in tensors.items()}, trained / "model.safetensors")
    assert push(trained, REPO).format == "full"


def test_merging_what_was_pushed(hub, trained, tmp_path):
    push(trained, REPO, format="adapter")
    merge(REPO, tmp_path / "merged")
    assert torch.equal(act(GridsPolicy.from_pretrained(tmp_path / "merged")), act(GridsPolicy.from_pretrained(trained)))
    with pytest.raises(CheckpointError, match="full checkpoint already"):
        merge(str(tmp_path / "merged"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_second_push_is_one_commit_that_deletes_what_is_stale(hub, trained):
    push(trained, REPO, format="full")
    repository = hub.repositories[REPO]
    extra = {"train_config.json": b"{}", "video.mp4": b"kept", "notes/a.md": b"kept"}
    repository.commit(repository.commits[-1].files | extra, "by hand")
    before = len(repository.commits)
    pushed = push(trained, REPO, format="adapter")
    assert len(repository.commits) == before + 1
    assert sorted(pushed.deleted) == ["model.safetensors", "train_config.json"]
    assert on_hub(hub) == ADAPTER | {"video.mp4", "notes/a.md"}


def test_pushing_the_same_again_changes_nothing(hub, trained, capsys):
    push(trained, REPO)
    before = len(hub.repositories[REPO].commits)
    assert push(trained, REPO).unchanged
    assert len(hub.repositories[REPO].commits) == before
    command.push(str(trained), REPO)
    assert f"unchanged at {REPO}@{hub.repositories[REPO].commits[-1].oid}" in capsys.readouterr().out
    assert not push(trained, REPO, format="full").unchanged


@pytest.mark.parametrize(
    ("options", "hidden", "warned"),
    [({}, True, True), ({}, False, False), ({"private": True}, True, False), ({"format": "full"}, True, False)],
)
def test_a_public_adapter_of_a_private_base_is_warned_about(hub, trained, capsys, options, hidden, warned):
    hub.repositories[BASE].private = hidden
    push(trained, REPO, **options)
    warning = f"warning: {REPO} is public, but its base {BASE} is private"
    assert (warning in capsys.readouterr().err) == warned


def test_a_dry_run_pushes_nothing(hub, trained):
    hub.requests.clear()
    pushed = push(trained, REPO, format="full", dry_run=True)
    assert set(pushed.files) == FULL
    assert pushed.commit is None
    assert "# push-16" in pushed.card
    assert hub.requests == []


def test_private_and_tags(hub, trained, tmp_path, monkeypatch):
    first = push(trained, REPO, private=True, tag="v1")
    assert hub.repositories[REPO].private
    assert hub.repositories[REPO].tags == {"v1": first.commit}
    push(trained, REPO, format="full")
    assert pull(f"{REPO}@v1", tmp_path / "v1").format == "adapter"
    assert pull(REPO, tmp_path / "main").format == "full"
    with pytest.raises(HubError, match="has a tag 'v1' already"):
        push(trained, REPO, tag="v1")
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="is private and you are not logged in"):
        pull(REPO, tmp_path / "anonymous")
    assert not (tmp_path / "anonymous").exists()


def test_a_public_repository_does_not_become_private_in_silence(hub, trained):
    push(trained, REPO)
    with pytest.raises(HubError, match="exists and is public"):
        push(trained, REPO, private=True)


def test_large_files_are_hashed_once(hub, trained, tmp_path, monkeypatch):
    hashed, hash_file = [], digests.sha256_of

    def spy(path):
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(digests, "sha256_of", spy)
    for format in ("full", "adapter"):
        hashed.clear()
        push(trained, REPO, format=format)
        # The adapter's base, too: the manifest names its digest.
        assert len(hashed) == len(set(hashed))
    pull(REPO, tmp_path / "pulled")
    hashed.clear()
    GridsPolicy.from_pretrained(tmp_path / "pulled")
    load(tmp_path / "pulled")
    assert hashed == []
    load(tmp_path / "pulled", verify=True)
    assert {"grids_adapter.safetensors", "model.safetensors"} <= set(hashed)
