"""Bodies cut short, flipped bytes, errors of the Hub and pushes in between: nothing is lost or half-way."""

import pytest
import torch

from comparing import act
from lerobot_grids.hub.pull import pull
from lerobot_grids.hub.push import push
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint.digests import sha256_of
from lerobot_policy_grids.errors import CheckpointError, HubError
from published import ADAPTER, FULL, REPO, on_hub


def test_a_cut_body_is_fetched_again(hub, trained, tmp_path):
    push(trained, REPO, format="full")
    hub.fail("GET", "resolve/.*/model.safetensors", "cut")
    try:
        pull(REPO, tmp_path / "pulled")
    except HubError:
        pull(REPO, tmp_path / "pulled")
    assert torch.equal(act(GridsPolicy.from_pretrained(tmp_path / "pulled")), act(GridsPolicy.from_pretrained(trained)))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "policy_preprocessor.json", "grids_manifest.json"]
)
def test_a_flipped_byte_is_found_and_mended_by_force(hub, trained, tmp_path, name):
    push(trained, REPO, format="full")
    hub.fail("GET", f"resolve/.*/{name}", "flipped")
    with pytest.raises(CheckpointError, match=rf"{name} has hash .*--force"):
        pull(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    # The client keeps what it was given.
    with pytest.raises(CheckpointError, match="--force"):
        pull(REPO, tmp_path / "pulled")
    pull(REPO, tmp_path / "pulled", force=True)
    assert sha256_of(tmp_path / "pulled" / "model.safetensors") == sha256_of(trained / "model.safetensors")


def test_a_busy_hub_is_asked_again(hub, trained, tmp_path):
    push(trained, REPO)
    hub.fail("HEAD", "resolve", 503, 2)
    pull(REPO, tmp_path / "pulled")


def test_a_failed_commit_leaves_the_repository_as_it_was(hub, trained):
    push(trained, REPO, format="full")
    before = hub.repositories[REPO].commits[-1].oid
    hub.fail("POST", "/commit/", 500, 9)
    with pytest.raises(HubError, match="the Hub answered 500"):
        push(trained, REPO, format="adapter")
    assert hub.repositories[REPO].commits[-1].oid == before
    hub.faults.clear()
    hub.requests.clear()
    push(trained, REPO, format="adapter")
    assert on_hub(hub) == ADAPTER
    # What was uploaded already is not uploaded again.
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_a_failed_upload_leaves_the_repository_as_it_was(hub, trained):
    hub.fail("PUT", "/upload/", 400, 99)
    with pytest.raises(HubError):
        push(trained, REPO, format="full")
    assert on_hub(hub) == set()
    hub.faults.clear()
    push(trained, REPO, format="full")
    assert on_hub(hub) == FULL


def test_a_push_from_elsewhere_in_between_is_not_overwritten(hub, trained, monkeypatch):
    from huggingface_hub import HfApi

    push(trained, REPO)
    repository = hub.repositories[REPO]
    original = HfApi.create_commit

    def meanwhile(self, *args, **options):
        repository.commit(repository.commits[-1].files | {"video.mp4": b"theirs"}, "theirs")
        return original(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", meanwhile)
    with pytest.raises(HubError, match="somebody else changed the repository meanwhile"):
        push(trained, REPO, format="full")
    assert repository.commits[-1].message == "theirs"
