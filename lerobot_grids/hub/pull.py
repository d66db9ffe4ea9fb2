"""Pulling a checkpoint: every file checked, the folder whole or not there; and making an adapter self-contained."""

import hashlib
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from lerobot_policy_grids.checkpoint import atomic_folder, check_processors, check_published, find_checkpoint
from lerobot_policy_grids.checkpoint.digests import digest_of
from lerobot_policy_grids.checkpoint.files import CONFIG_FILE, size_limit
from lerobot_policy_grids.checkpoint.find import require_complete
from lerobot_policy_grids.checkpoint.hub_errors import asking_the_hub
from lerobot_policy_grids.checkpoint.load import fetch_base
from lerobot_policy_grids.checkpoint.manifest import read_manifest, verify_manifest, write_manifest
from lerobot_policy_grids.errors import CheckpointError, OutputExistsError

from .formats import write_full
from .names import parse_repository

# The client waits 10 s for more of a file, and tries 5 times.
SILENT_S = 600
_INCOMPLETE = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})\.[0-9a-f]{8}\.incomplete")


@dataclass(frozen=True)
class Pulled:
    """What was pulled: the folder, its commit, and whether it is an adapter or full."""

    folder: Path
    commit: str
    format: str


def pull(source: str, target: Path, *, force: bool = False) -> Pulled:
    """Fetch a checkpoint from the Hub into a folder that appears whole and verified, or not at all.

    Files that an interrupted pull has finished are not fetched again. The base of an adapter goes to the Hub's cache,
    so that the policy loads without a network afterwards.

    Args:
        source: `user/name` or `user/name@revision`.
        target: The folder to appear.
        force: Replace `target`, if it is a checkpoint, and fetch everything anew.

    Raises:
        HubError: If the Hub does not give it.
        CheckpointError: If what it gives is damaged, incomplete or not to be trusted.
        OutputExistsError: If `target` exists and `force` is false, or it is no checkpoint.
    """
    repo_id, revision = parse_repository(source)
    if target.exists() and not force:
        raise OutputExistsError(f"{target} already exists; choose another folder, or replace it with --force")
    if target.exists() and not (target / CONFIG_FILE).is_file():
        raise OutputExistsError(f"{target} is no checkpoint, and --force replaces nothing else; choose another folder")
    with asking_the_hub(f"{source} cannot be pulled"):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        files = [file for file in info.siblings or [] if size_limit(file.rfilename) is not None]
        for file in files:
            limit = size_limit(file.rfilename)
            if limit is not None and (file.size or 0) > limit:
                raise CheckpointError(f"{source}: {file.rfilename} has {file.size} bytes, expected at most {limit}")
        names = [file.rfilename for file in files]
        sweep_incomplete(repo_id)
        cached = Path(
            snapshot_download(repo_id, revision=info.sha, allow_patterns=names or ["-"], force_download=force)
        )
    with atomic_folder(target, replace=force) as folder:
        for file in files:
            (folder / file.rfilename).parent.mkdir(exist_ok=True)
            shutil.copyfile(cached / file.rfilename, folder / file.rfilename)
            _check_download(folder / file.rfilename, file)
        require_complete(folder)
        check_published(folder)
        check_processors(folder)
        manifest = verify_manifest(folder)
        if manifest is not None and manifest.base is not None:
            sweep_incomplete(manifest.base.repo_id)
            fetch_base(manifest.base, verify=True)
    return Pulled(target, str(info.sha), "full" if manifest is None else manifest.format)


def _check_download(path: Path, file: Any) -> None:
    """Compare a file with the Hub's own hash: the client compares sizes only."""
    if file.lfs is not None:
        expected, seen = file.lfs.sha256, digest_of(path, verify=True)
    else:
        data = path.read_bytes()
        expected, seen = file.blob_id, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if seen != expected:
        raise CheckpointError(
            f"{path.name} has hash {seen}, expected {expected}; it was damaged on its way, pull it again with --force"
        )


def merge(source: str, target: Path) -> None:
    """Make a self-contained checkpoint of an adapter, bit for bit the same policy.

    Args:
        source: Checkpoint folder, output folder of a run, or Hub id.
        target: The folder to appear, whole or not at all.

    Raises:
        CheckpointError: If the source is no adapter, or its base is not what it was.
        OutputExistsError: If `target` exists.
    """
    folder = find_checkpoint(source)
    manifest = read_manifest(folder)
    if manifest is None or manifest.base is None:
        raise CheckpointError(f"{source} is a full checkpoint already; nothing to merge")
    with atomic_folder(target) as merged:
        write_full(folder, merged)
        write_manifest(merged)


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
