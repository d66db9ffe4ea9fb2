"""Push a checkpoint in one commit, which also deletes stale files of an earlier checkpoint."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from lerobot_policy_grids.checkpoint import resolve_checkpoint
from lerobot_policy_grids.checkpoint.atomic import explaining_a_full_disk, naming, sweep
from lerobot_policy_grids.checkpoint.files import ADAPTER_FILE, CARD_FILE, size_limit
from lerobot_policy_grids.checkpoint.hub_errors import asking_the_hub
from lerobot_policy_grids.checkpoint.manifest import read_manifest
from lerobot_policy_grids.errors import HubError

from .names import parse_repository
from .prepare import Description, Format, prepare

# Files of other checkpoint formats; beside this checkpoint, other programs would load them instead.
OTHER_CHECKPOINTS = ("train_config.json", "adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Pushed:
    """Result of a push or of a dry run.

    Attributes:
        repo_id: Repository, `user/name`.
        format: "adapter" or "full".
        files: Names of the files and their sizes in bytes.
        deleted: Stale files of an earlier checkpoint that the commit deleted.
        card: Text of README.md.
        commit: Id of the commit; None for a dry run.
        unchanged: Whether the repository had all of this already, so that there is no new commit.
    """

    repo_id: str
    format: str
    files: dict[str, int]
    deleted: list[str]
    card: str
    commit: str | None = None
    unchanged: bool = False


def check_login(repo_id: str) -> None:
    """Raise `HubError` unless the user is logged in. Call it before a training whose result will be pushed."""
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
        repo_id: `user/name`; created if it does not exist.
        format: "adapter", "full", or "auto" for the adapter if it is possible and much smaller.
        private: Whether to create a private repository; an existing one must then be private.
        tag: Tag for the commit, such as v1.
        description: Information for the card.
        dry_run: Whether to prepare and check all files without pushing them.

    Raises:
        CheckpointError: If the checkpoint cannot be pushed.
        HubError: If the Hub refuses the push; the repository is then unchanged, or new and empty.
    """
    if parse_repository(repo_id)[1] is not None:
        raise HubError(f"'{repo_id}' names a revision, but a push creates a new one; give user/name")
    folder = resolve_checkpoint(source)
    if not dry_run:
        # Check the login before minutes of hashing.
        check_login(repo_id)
    with _staging(folder) as staging:
        prepare(folder, staging, repo_id, format, description or Description())
        names = _files_in(staging)
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
        _warn_of_a_private_base(staging, repo_id, private)
        done = commit_folder(staging, repo_id, message, private=private, tag=tag)
        return replace(pushed, deleted=done.deleted, commit=done.commit, unchanged=done.unchanged)


def _warn_of_a_private_base(staging: Path, repo_id: str, private: bool) -> None:
    manifest = read_manifest(staging)
    if manifest is None or manifest.base is None:
        return
    with asking_the_hub(f"{repo_id} cannot be pushed to"):
        if _is_private(manifest.base.repo_id, False) and not _is_private(repo_id, private):
            print(
                f"warning: {repo_id} is public, but its base {manifest.base.repo_id} is private, so others cannot load "
                "the adapter; push with --private or --format full, or make the base public",
                file=sys.stderr,
            )


def _is_private(repo_id: str, unknown: bool) -> bool:
    """Whether a repository is private; `unknown` if the Hub does not say, as for one that does not exist."""
    try:
        return bool(HfApi().model_info(repo_id).private)
    except HfHubHTTPError:
        return unknown


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Yield a folder on the checkpoint's disk, so that weights can be hard-linked; remove those of killed pushes."""
    sweep(folder)
    if not os.access(folder.parent, os.W_OK):
        with TemporaryDirectory() as elsewhere, _copying(folder, Path(elsewhere)):
            yield Path(elsewhere)
        return
    staging = folder.with_name(f".{folder.name}.push.partial-{os.getpid()}")
    try:
        with _copying(folder, staging):
            staging.mkdir()
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _copying(folder: Path, staging: Path) -> Iterator[None]:
    """Let errors name the checkpoint, and not the copy of it that is prepared for the push."""
    with explaining_a_full_disk(f"a copy of {folder} for the push", staging.parent), naming(staging, folder):
        yield


@dataclass(frozen=True)
class Committed:
    """Id of a commit, the stale files of an earlier checkpoint that it deleted, and whether it was there before."""

    commit: str
    deleted: list[str]
    unchanged: bool


def commit_folder(
    folder: Path, repo_id: str, message: str, *, private: bool = False, tag: str | None = None
) -> Committed:
    """Commit a folder as the checkpoint of a repository, and delete stale files of an earlier one.

    Files that do not belong to a checkpoint stay.

    Args:
        folder: A folder with plain files only.
        repo_id: `user/name`; created if it does not exist.
        message: Message of the commit.
        private: Whether to create a private repository; an existing one must then be private.
        tag: Tag for the commit.

    Raises:
        HubError: If the Hub refuses, or somebody else pushed meanwhile; the repository is unchanged, or new and empty.
    """
    api, names = HfApi(), _files_in(folder)
    with asking_the_hub(f"{repo_id} cannot be pushed to"):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise HubError(f"{repo_id} exists and is public; make it private in its settings, or drop --private")
        if tag is not None and tag in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
            raise HubError(f"{repo_id} has a tag '{tag}' already; choose another tag, or delete that one first")
        there = {file.rfilename for file in info.siblings or []}
        stale = sorted(name for name in there - set(names) if size_limit(name) is not None or name in OTHER_CHECKPOINTS)
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in names]
        operations += [CommitOperationDelete(name) for name in stale]
        # With parent_commit the Hub refuses the commit if somebody else pushed meanwhile.
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=info.sha)
    if tag is not None:
        with asking_the_hub(f"{repo_id} was pushed as {commit.oid}, but cannot be tagged"):
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return Committed(str(commit.oid), stale, commit.oid == info.sha)


def _files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
