"""Pushing checkpoints to the Hub and pulling them: one commit, every file checked, nothing half-way."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, snapshot_download

from lerobot_policy_grids.base_weights import fetch_base
from lerobot_policy_grids.checkpoint import atomic_folder, find_checkpoint, require_complete, resolve_checkpoint, sweep
from lerobot_policy_grids.commit import commit_folder
from lerobot_policy_grids.errors import CheckpointError, HubError, OutputExistsError
from lerobot_policy_grids.files import ADAPTER_FILE, CARD_FILE, CONFIG_FILE, size_limit
from lerobot_policy_grids.formats import write_full
from lerobot_policy_grids.hub_errors import asking_the_hub
from lerobot_policy_grids.manifest import REPOSITORY, read_manifest, sha256_of, verify_manifest
from lerobot_policy_grids.trust import check_processors, check_published

from .cache_sweep import sweep_incomplete
from .publishing import Description, Format, prepare


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would be.

    Attributes:
        repo_id: Where.
        format: "adapter" or "full".
        files: Name -> size in bytes.
        deleted: Files of the repository that went, being of an earlier checkpoint.
        card: Text of README.md.
        commit: Its id; None of a dry run.
    """

    repo_id: str
    format: str
    files: dict[str, int]
    deleted: list[str]
    card: str
    commit: str | None = None


@dataclass(frozen=True)
class Pulled:
    """What was pulled: the folder, its commit, and whether it is an adapter or full."""

    folder: Path
    commit: str
    format: str


def parse_repository(text: str) -> tuple[str, str | None]:
    """(`user/name`, revision or None) of `user/name[@revision]`.

    Raises:
        HubError: If it is no such thing.
    """
    repo_id, _, revision = text.partition("@")
    if not REPOSITORY.fullmatch(repo_id) or ".." in repo_id:
        raise HubError(f"'{text}' is no repository; give user/name, or to pull user/name@revision")
    return repo_id, revision or None


def check_login(repo_id: str) -> None:
    """Raise `HubError` unless somebody is logged in; before a training whose result is to be pushed."""
    parse_repository(repo_id)
    with asking_the_hub(f"{repo_id} cannot be pushed to"):
        HfApi().whoami()


def push(
    source: Path,
    repo_id: str,
    *,
    format: Format = "auto",
    private: bool = False,
    tag: str | None = None,
    description: Description | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Push a checkpoint in one commit, with a card.

    Args:
        source: Checkpoint folder, or output folder of a run.
        repo_id: `user/name`; made if it does not exist.
        format: "adapter", "full", or "auto" for the smaller one that is possible.
        private: Whether a repository that is made is private; one that exists must be so then.
        tag: Name for the commit, such as v1.
        description: What the card is told.
        dry_run: Prepare and check everything, and push nothing.

    Raises:
        CheckpointError: If the checkpoint is not fit to be pushed.
        HubError: If the Hub refuses; the repository is then as it was, or new and empty.
    """
    if parse_repository(repo_id)[1] is not None:
        raise HubError(f"'{repo_id}' names a revision; a push adds one, give user/name")
    folder = resolve_checkpoint(source)
    if not dry_run:
        # Before minutes of hashing whose result could not be pushed.
        check_login(repo_id)
    with _staging(folder) as staging:
        prepare(folder, staging, repo_id, format, description or Description())
        names = sorted(path.name for path in staging.iterdir())
        pushed = Pushed(
            repo_id=repo_id,
            format="adapter" if ADAPTER_FILE in names else "full",
            files={name: (staging / name).stat().st_size for name in names},
            deleted=[],
            card=(staging / CARD_FILE).read_text(encoding="utf-8"),
        )
        step = "" if description is None or description.step is None else f" of step {description.step}"
        message = f"{pushed.format} checkpoint{step}, lerobot-grids {version('lerobot_policy_grids')}"
        if dry_run:
            return pushed
        done = commit_folder(staging, repo_id, message, private=private, tag=tag)
        return replace(pushed, deleted=done.deleted, commit=done.commit)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder on the checkpoint's disk, so that weights are linked instead of copied; a killed push's is swept."""
    sweep(folder)
    if not os.access(folder.parent, os.W_OK):
        with TemporaryDirectory() as elsewhere:
            yield Path(elsewhere)
        return
    staging = folder.with_name(f".{folder.name}.push.partial-{os.getpid()}")
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
            shutil.copyfile(cached / file.rfilename, folder / file.rfilename)
            _check_download(folder / file.rfilename, file)
        require_complete(folder)
        check_published(folder)
        check_processors(folder)
        manifest = verify_manifest(folder)
        if manifest is not None and manifest.base is not None:
            sweep_incomplete(manifest.base.repo_id)
            fetch_base(manifest.base)
    return Pulled(target, str(info.sha), "full" if manifest is None else manifest.format)


def _check_download(path: Path, file: Any) -> None:
    """Compare a file with the Hub's own hash: the client compares sizes only."""
    if file.lfs is not None:
        expected, seen = file.lfs.sha256, sha256_of(path)
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
