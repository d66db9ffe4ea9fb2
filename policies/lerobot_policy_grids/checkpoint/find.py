"""Find the checkpoint that a user names, and read its configuration."""

import re
from pathlib import Path
from typing import Any

import draccus
from huggingface_hub import snapshot_download
from lerobot.configs import PreTrainedConfig

from ..errors import CheckpointError, GridsError, NoConfigError
from .files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    LOADED,
    MANIFEST_FILE,
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    WEIGHTS_FILE,
    WEIGHTS_FILES,
    read_json,
)
from .hub_errors import explain
from .trust import check_published

# What PEFT saves a LoRA in.
PEFT_FILE = "adapter_model.safetensors"
# Folder inside a run's output with the checkpoint that LeRobot's commands load.
CHECKPOINT_FOLDER = "pretrained_model"
# The same inside the output of lerobot-train.
LAST_CHECKPOINT = f"checkpoints/last/{CHECKPOINT_FOLDER}"


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder at `path`: `path` itself, or the last one inside a run's output folder.

    Raises:
        CheckpointError: If there is no checkpoint.
    """
    for folder in (path, path / CHECKPOINT_FOLDER, path / LAST_CHECKPOINT):
        if (folder / CONFIG_FILE).is_file():
            return folder
    seen, kind = (f"holds no {CONFIG_FILE}", NoConfigError) if path.is_dir() else ("is not a folder", CheckpointError)
    raise kind(f"{path} {seen}; expected a checkpoint folder, or the --output of a training run")


def find_checkpoint(source: str, *, weights: bool = True, check: bool = True, **options: Any) -> Path:
    """The checkpoint folder that a user names: a folder, or an id on the Hub, `user/name` or `user/name@revision`.

    A published checkpoint is checked before it is returned.

    Args:
        source: Folder or Hub id. A folder wins over a repository of the same name.
        weights: Whether the weights are fetched, too.
        check: Whether a published one is checked; otherwise the caller must, before anything reads it.
        **options: Options of the Hub's client: revision, token, cache_dir, ...

    Raises:
        CheckpointError: If it is neither, the download fails, or `check_published` refuses it.
    """
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
        folder = resolve_checkpoint(Path(source))
    else:
        repository, _, revision = source.partition("@")
        options["revision"] = revision or options.get("revision")
        try:
            patterns = LOADED if weights else [name for name in LOADED if name not in WEIGHTS_FILES]
            folder = Path(snapshot_download(repository, allow_patterns=patterns, **options))
        except Exception as error:  # the Hub client's errors share no base class
            raise CheckpointError(
                f"{source} is not a folder here and cannot be fetched from the Hub: {explain(error)}"
            ) from error
        resolve_checkpoint(folder)
    if check and is_published(folder):
        check_published(folder)
    return folder


def is_published(folder: Path) -> bool:
    """Whether a checkpoint folder came from the Hub: it is in the client's cache, or was pushed before."""
    return provenance(folder) is not None or (folder / MANIFEST_FILE).is_file()


def provenance(folder: Path) -> tuple[str, str] | None:
    """(Hub id, commit) of a folder in the Hub's cache, `models--user--name/snapshots/<commit>`; None for others."""
    repository = folder.parent.parent.name.removeprefix("models--")
    if folder.parent.name != "snapshots" or not re.fullmatch(r"[0-9a-f]{40}", folder.name):
        return None
    return repository.replace("--", "/", 1), folder.name


def policy_type(folder: Path) -> str:
    """The LeRobot policy type that a checkpoint's config.json names.

    Raises:
        CheckpointError: If the file is not JSON or names no type.
    """
    path = folder / CONFIG_FILE
    name = read_json(path).get("type")
    if not isinstance(name, str):
        raise CheckpointError(
            f"{path} has type {name!r}, expected the name of a policy type; restore the checkpoint from its source"
        )
    return name


def read_config(folder: Path) -> Any:
    """The configuration of a checkpoint folder.

    Raises:
        CheckpointError: If config.json is missing, not JSON, or does not fit its policy type.
        GridsError: If a value in it is out of bounds.
    """
    policy_type(folder)
    try:
        # `PreTrainedConfig.from_pretrained` builds a command line first, which takes more than a second.
        return draccus.decode(PreTrainedConfig, read_json(folder / CONFIG_FILE))
    except GridsError:
        raise
    except Exception as error:  # draccus raises many types for a malformed file
        raise CheckpointError(f"{folder / CONFIG_FILE} is not a valid configuration: {error}") from error


def require_complete(folder: Path, *, weights: bool = True) -> None:
    """Raise `CheckpointError` unless the folder holds configuration and both processors, and weights if asked."""
    if (folder / PEFT_FILE).is_file():
        raise CheckpointError(
            f"{folder} is a PEFT adapter, which holds low-rank weights alone; train with lerobot-grids fit "
            "--model.train reducer+lora, which saves whole weights, or merge it with PEFT and save the policy"
        )
    file = ADAPTER_FILE if (folder / ADAPTER_FILE).is_file() else WEIGHTS_FILE
    names = [CONFIG_FILE, *([file] if weights else []), PREPROCESSOR_FILE, POSTPROCESSOR_FILE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}; a checkpoint needs all of {', '.join(names)}. "
            "Copy it again from its source"
        )
