"""Putting a folder on the Hub as one commit that leaves nothing of an earlier checkpoint behind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from .errors import HubError
from .files import size_limit
from .hub_errors import asking_the_hub

# Of checkpoints in other formats, which would be taken for this one if they stayed beside it.
OTHER_CHECKPOINTS = ("train_config.json", "adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Committed:
    """A commit's id, where it can be looked at, and the files that went with it, being of an earlier checkpoint."""

    commit: str
    url: str
    deleted: list[str]


def commit_folder(
    folder: Path, repo_id: str, message: str, *, private: bool = False, tag: str | None = None
) -> Committed:
    """Make a folder's files the checkpoint of a repository; other files in it stay.

    Args:
        folder: Plain files alone.
        repo_id: `user/name`; made if it does not exist.
        message: Of the commit.
        private: Whether a repository that is made is private; one that exists must be so then.
        tag: Name for the commit.

    Raises:
        HubError: If the Hub refuses, or somebody else pushed meanwhile; the repository is as it was, or new and empty.
    """
    api, names = HfApi(), sorted(path.name for path in folder.iterdir())
    with asking_the_hub(f"{repo_id} cannot be pushed to"):
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise HubError(f"{repo_id} exists and is public; make it private in its settings, or do not ask for it")
        if tag is not None and tag in {ref.name for ref in api.list_repo_refs(repo_id).tags}:
            raise HubError(f"{repo_id} has a tag '{tag}' already; choose another, or delete that one first")
        there = {file.rfilename for file in info.siblings or []}
        stale = sorted(name for name in there - set(names) if size_limit(name) is not None or name in OTHER_CHECKPOINTS)
        operations: list[Any] = [CommitOperationAdd(name, str(folder / name)) for name in names]
        operations += [CommitOperationDelete(name) for name in stale]
        # Refused if somebody else pushed in between.
        commit = api.create_commit(repo_id, operations, commit_message=message, parent_commit=info.sha)
    if tag is not None:
        with asking_the_hub(f"{repo_id} was pushed as {commit.oid}, but cannot be tagged"):
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return Committed(str(commit.oid), str(url), stale)
