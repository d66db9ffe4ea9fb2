"""What killed downloads left in the client's cache goes with the next pull, and nothing else does."""

import os
import time

import pytest
from huggingface_hub.utils import WeakFileLock

from comparing import BASE
from lerobot_grids.hub.pull import SILENT_S, pull
from lerobot_grids.hub.push import push

REPO = "me/push-16"
ETAG = "0" * 64


@pytest.fixture
def leave(tmp_path):
    """Put a file among a repository's contents as a killed download does, last written to some seconds ago."""

    def put(repo_id, name, age):
        path = tmp_path / "cache" / f"models--{repo_id.replace('/', '--')}" / "blobs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
        return path

    return put


def test_leftovers_of_the_policy_and_of_its_base_go(hub, trained, tmp_path, leave):
    push(trained, REPO)
    gone = [
        leave(name, f"{etag}.0123abcd.incomplete", 2 * SILENT_S) for name in (REPO, BASE) for etag in (ETAG, "f" * 40)
    ]
    pull(REPO, tmp_path / "pulled")
    assert not [path for path in gone if path.exists()]


def test_what_somebody_may_be_writing_stays(hub, trained, tmp_path, leave):
    push(trained, REPO)
    kept = [
        leave(REPO, f"{ETAG}.0123abcd.incomplete", SILENT_S / 2),
        leave(REPO, f"{'1' * 64}.0123abcd.incomplete", 2 * SILENT_S),
        leave(REPO, "notes.incomplete", 2 * SILENT_S),
        leave("me/other", f"{ETAG}.0123abcd.incomplete", 2 * SILENT_S),
    ]
    lock = tmp_path / "cache" / ".locks" / "models--me--push-16" / f"{'1' * 64}.lock"
    lock.parent.mkdir(parents=True)
    with WeakFileLock(lock):
        pull(REPO, tmp_path / "pulled")
    assert [path for path in kept if path.exists()] == kept
