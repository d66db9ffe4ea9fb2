"""What cannot be pushed or pulled is said in words, and nothing is begun."""

import errno
import re

import httpx
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from lerobot_grids.hub.names import parse_repository
from lerobot_grids.hub.pull import pull
from lerobot_grids.hub.push import check_login, push
from lerobot_policy_grids.checkpoint.hub_errors import explain
from lerobot_policy_grids.errors import HubError, OutputExistsError
from loopback_endpoints import READ_TOKEN, TOKEN
from published import ADAPTER, REPO


@pytest.mark.parametrize(
    ("token", "repository", "message"),
    [
        (TOKEN, "other/repo", "your token has no permission for this"),
        (READ_TOKEN, REPO, "your token has no permission for this"),
        ("hf_nobody", REPO, "your token is not valid"),
    ],
)
def test_who_may_not_push(hub, trained, monkeypatch, token, repository, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=f"{repository} cannot be pushed to: {message}") as caught:
        push(trained, repository)
    assert token not in str(caught.value)


@pytest.mark.parametrize("name", ["repo", "a/b/c", "../x", "/etc/x", "~/x", "https://hub/x", "me/a..b", "me/x y"])
def test_what_is_no_repository(name):
    with pytest.raises(HubError, match="is not the name of a repository"):
        parse_repository(name)


def test_a_push_names_no_revision(hub, trained):
    with pytest.raises(HubError, match="names a revision"):
        push(trained, f"{REPO}@v1")


def test_without_a_login_nothing_is_begun(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="you are not logged in; log in with `hf auth login`"):
        check_login(REPO)


def wrapped(error):
    """As the client raises what happens during an upload."""
    uploading = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    uploading.__cause__ = error
    return uploading


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (wrapped(httpx.ReadError("Connection reset by peer")), r"the Hub cannot be reached.* \(Connection reset"),
        (wrapped(ConnectionResetError(104, "reset")), "the Hub cannot be reached"),
        (wrapped(LocalTokenNotFoundError("Token is required")), "you are not logged in"),
        (wrapped(OSError(errno.ENOSPC, "No space left on device")), "the disk of .* is full; make room there"),
        (wrapped(None), "client failed with RuntimeError"),
    ],
)
def test_the_reason_of_an_error_is_said(error, message):
    assert re.match(f".*{message}", explain(error))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hub: hub.repositories.pop(REPO), "it does not exist, or is private"),
        (lambda hub: setattr(hub.repositories[REPO], "gated", True), "its owner must grant you access"),
        (lambda hub: hub.fail("GET", "api/models", 500, 9), "the Hub answered 500"),
    ],
)
def test_why_a_pull_failed_is_said(hub, trained, tmp_path, change, message):
    push(trained, REPO)
    change(hub)
    with pytest.raises(HubError, match=f"{REPO} cannot be pulled: {message}"):
        pull(REPO, tmp_path / "pulled")
    with pytest.raises(HubError, match="no such revision") if message.endswith("500") else pytest.raises(HubError):
        hub.faults.clear()
        pull(f"{REPO}@v9", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_an_unreachable_hub_is_said(trained, tmp_path, hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached; check the network"):
        pull(REPO, tmp_path / "pulled")


def test_an_existing_folder_is_kept_unless_forced(hub, trained, tmp_path):
    push(trained, REPO)
    (tmp_path / "pulled").mkdir()
    (tmp_path / "pulled" / "mine").touch()
    with pytest.raises(OutputExistsError, match="replace it with --force"):
        pull(REPO, tmp_path / "pulled")
    with pytest.raises(OutputExistsError, match="is not a checkpoint, and --force replaces nothing else"):
        pull(REPO, tmp_path / "pulled", force=True)
    (tmp_path / "pulled" / "config.json").touch()
    pull(REPO, tmp_path / "pulled", force=True)
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == ADAPTER
