"""Clearing up in the cache of the Hub's client, which never removes what a killed download left there."""

import re
import time
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

# The client waits 10 s for more of a file, and tries 5 times.
SILENT_S = 600
_INCOMPLETE = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})\.[0-9a-f]{8}\.incomplete")


def sweep_incomplete(repo_id: str) -> None:
    """Remove what killed downloads of a repository left behind; nobody goes on from it.

    A file goes if it was not written to for `SILENT_S` and nobody holds the lock under which the client writes it.
    Either would do on most machines; network file systems may ignore locks, and clocks may be wrong. What cannot be
    removed stays, without an error.

    Args:
        repo_id: `user/name`.
    """
    name = repo_folder_name(repo_id=repo_id, repo_type="model")
    cache = Path(constants.HF_HUB_CACHE)
    for path in (cache / name / "blobs").glob("*.incomplete"):
        found = _INCOMPLETE.fullmatch(path.name)
        # A lock that is held raises TimeoutError, which is an OSError.
        with suppress(OSError):
            if found is None or time.time() - path.stat().st_mtime < SILENT_S:
                continue
            lock = cache / ".locks" / name / f"{found[1]}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock, timeout=0.1):
                path.unlink()
