"""Pull a checkpoint and check every file, and convert an adapter into a full checkpoint."""

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
from lerobot_policy_grids.checkpoint.atomic import naming
from lerobot_policy_grids.checkpoint.digests import digest_of
from lerobot_policy_grids.checkpoint.files import CONFIG_FILE, open_tensors, size_limit
from lerobot_policy_grids.checkpoint.find import policy_type, require_complete
from lerobot_policy_grids.checkpoint.hub_errors import asking_the_hub
from lerobot_policy_grids.checkpoint.load import fetch_base
from lerobot_policy_grids.checkpoint.manifest import read_manifest, verify_manifest, write_manifest
from lerobot_policy_grids.checkpoint.statistics import check_statistics
from lerobot_policy_grids.configuration_grids import GRIDS_TYPE
from lerobot_policy_grids.errors import CheckpointError, OutputExistsError

from .formats import write_full
from .names import parse_repository

# Seconds without a write after which a download has ended. The client gives up after 5 tries of 10 s.
SILENT_S = 600
_INCOMPLETE = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})\.[0-9a-f]{8}\.incomplete")


@dataclass(frozen=True)
class Pulled:
    """Result of a pull: the folder, its commit, and its format, "adapter" or "full"."""

    folder: Path
    commit: str
    format: str


def pull(source: str, target: Path, *, force: bool = False) -> Pulled:
    """Fetch a checkpoint from the Hub into a folder, which appears only when all files are verified.

    Files that an interrupted pull completed are not fetched again. The base of an adapter is fetched into the Hub's
    cache, so the policy later loads without network access.

    Args:
        source: `user/name` or `user/name@revision`.
        target: The folder to write.
        force: Whether to replace `target`, if it is a checkpoint, and to fetch all files again.

    Raises:
        HubError: If the download fails.
        CheckpointError: If the checkpoint is damaged, incomplete or not trusted.
        OutputExistsError: If `target` exists and `force` is false, or it is not a checkpoint.
    """
    repo_id, revision = parse_repository(source)
    if target.exists() and not force:
        raise OutputExistsError(f"{target} already exists; choose another folder, or replace it with --force")
    if target.exists() and not (target / CONFIG_FILE).is_file():
        raise OutputExistsError(
            f"{target} is not a checkpoint, and --force replaces nothing else; choose another folder"
        )
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
    with atomic_folder(target, replace=force) as folder, naming(folder, source):
        for file in files:
            (folder / file.rfilename).parent.mkdir(exist_ok=True)
            shutil.copyfile(cached / file.rfilename, folder / file.rfilename)
            _check_download(folder / file.rfilename, file)
        require_complete(folder)
        check_published(folder)
        check_processors(folder)
        _check_tensors(folder)
        manifest = verify_manifest(folder)
        if manifest is not None and manifest.base is not None:
            sweep_incomplete(manifest.base.repo_id)
            fetch_base(manifest.base, verify=True)
    return Pulled(target, str(info.sha), "full" if manifest is None else manifest.format)


def _check_download(path: Path, file: Any) -> None:
    """Compare a file with its hash on the Hub, because the client only compares sizes."""
    if file.lfs is not None:
        expected, seen = file.lfs.sha256, digest_of(path, verify=True)
    else:
        data = path.read_bytes()
        expected, seen = file.blob_id, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if seen != expected:
        raise CheckpointError(
            f"{path.name} has hash {seen}, expected {expected}; damaged in the download, pull it again with --force"
        )


def _check_tensors(folder: Path) -> None:
    """Check the headers of all tensors, and the values of the statistics; loading checks the weights' values."""
    for path in sorted(folder.glob("*.safetensors")):
        with open_tensors(path, "its author must push it again") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                file.get_slice(name).get_shape()
    check_statistics(folder, complete=policy_type(folder) == GRIDS_TYPE)


def merge(source: str, target: Path) -> None:
    """Make a full checkpoint from an adapter; the policy has exactly the same weights.

    Args:
        source: Checkpoint folder, output folder of a run, or Hub id.
        target: The folder to write, completely or not at all.

    Raises:
        CheckpointError: If the source is not an adapter, or its base has changed.
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
    """Remove files that killed downloads of a repository left behind; the client never resumes them.

    A file is removed if it was not written for `SILENT_S` seconds and no process holds the client's lock for it. Both
    are checked, because network file systems may ignore locks and clocks may be wrong. A file that cannot be removed
    is left without an error.

    Args:
        repo_id: `user/name`.
    """
    name = repo_folder_name(repo_id=repo_id, repo_type="model")
    cache = Path(constants.HF_HUB_CACHE)
    for path in (cache / name / "blobs").glob("*.incomplete"):
        found = _INCOMPLETE.fullmatch(path.name)
        # A lock held by another process raises TimeoutError, which is an OSError.
        with suppress(OSError):
            if found is None or time.time() - path.stat().st_mtime < SILENT_S:
                continue
            lock = cache / ".locks" / name / f"{found[1]}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock, timeout=0.1):
                path.unlink()
