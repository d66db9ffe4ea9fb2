"""Strict loading and atomic saving of checkpoint folders.

LeRobot loads with `strict=False`: a checkpoint with missing keys becomes a policy with random weights and a
line in the log. Here a checkpoint fits exactly or is refused, and a folder appears whole or not at all.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from lerobot.configs import PreTrainedConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import CheckpointError, GridsError, OutputExistsError
from .files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    LOADED,
    MANIFEST_FILE,
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    WEIGHTS_FILE,
    read_json,
)
from .hub_errors import explain
from .trust import check_published

# Where a training run keeps the checkpoint that LeRobot's commands load.
CHECKPOINT_FOLDER = "pretrained_model"
# What weights may be stored in and converted from; anything else is another quantity.
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means: itself, or `pretrained_model/` inside a run's output folder.

    Raises:
        CheckpointError: If there is none.
    """
    for folder in (path, path / CHECKPOINT_FOLDER):
        if (folder / CONFIG_FILE).is_file():
            return folder
    seen = "is not a folder" if not path.is_dir() else f"holds no {CONFIG_FILE}"
    raise CheckpointError(f"{path} {seen}; expected a checkpoint folder, or the --output of a training run")


def find_checkpoint(source: str, **options: Any) -> Path:
    """The checkpoint folder that a user names: a folder, or an id on the Hub, `user/name` or `user/name@revision`.

    What somebody published is checked before it is returned.

    Args:
        source: Folder or Hub id. A folder wins over a repository of the same name.
        **options: For the Hub's client: revision, token, cache_dir, ...

    Raises:
        CheckpointError: If it is neither, the Hub does not give it, or `check_published` refuses it.
    """
    if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source):
        folder = resolve_checkpoint(Path(source))
    else:
        repository, _, revision = source.partition("@")
        options["revision"] = revision or options.get("revision")
        try:
            folder = Path(snapshot_download(repository, allow_patterns=LOADED, **options))
        except Exception as error:  # the Hub client's errors share no base class
            raise CheckpointError(
                f"{source} is no folder here and cannot be fetched from the Hub: {explain(error)}"
            ) from error
        resolve_checkpoint(folder)
    if is_published(folder):
        check_published(folder)
    return folder


def is_published(folder: Path) -> bool:
    """Whether a checkpoint folder came from the Hub: it lies in the client's cache, or was pushed once."""
    return provenance(folder) is not None or (folder / MANIFEST_FILE).is_file()


def provenance(folder: Path) -> tuple[str, str] | None:
    """(Hub id, commit) of a folder in the Hub's cache, `models--user--name/snapshots/<commit>`; None for any other."""
    repository = folder.parent.parent.name.removeprefix("models--")
    if folder.parent.name != "snapshots" or not re.fullmatch(r"[0-9a-f]{40}", folder.name):
        return None
    return repository.replace("--", "/", 1), folder.name


def policy_type(folder: Path) -> str:
    """The LeRobot policy type that a checkpoint's config.json names.

    Raises:
        CheckpointError: If the file is not JSON or names none.
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
        CheckpointError: If config.json is missing, is no JSON, or does not fit its policy type.
        GridsError: If a value in it is out of bounds.
    """
    policy_type(folder)
    try:
        return PreTrainedConfig.from_pretrained(folder)
    except GridsError:
        raise
    except Exception as error:  # draccus raises many types for a malformed file
        raise CheckpointError(f"{folder / CONFIG_FILE} is no valid configuration: {error}") from error


def require_complete(folder: Path) -> None:
    """Raise `CheckpointError` unless the folder holds configuration, weights and both processors."""
    weights = ADAPTER_FILE if (folder / ADAPTER_FILE).is_file() else WEIGHTS_FILE
    names = (CONFIG_FILE, weights, PREPROCESSOR_FILE, POSTPROCESSOR_FILE)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}; a checkpoint needs all of {', '.join(names)}. "
            "Copy it again from its source"
        )


def load_weights(
    module: nn.Module,
    path: Path,
    rename: Callable[[list[str]], dict[str, str]] | None = None,
    required: str = "",
) -> None:
    """Load a safetensors file into `module`: exactly its keys and shapes, all values finite.

    Tensors are read one by one, so that the peak in memory is the module and its largest tensor. Values take
    the module's precision, as in LeRobot's own loading, but only from float32, bfloat16 or float16.

    Args:
        module: Where the values go.
        path: The file.
        rename: Maps the file's names to {the module's name: the file's name}, for checkpoints of older
            releases. None takes the names as they are.
        required: Only names that begin so must be in the file; the others keep their values unless they are.

    Raises:
        CheckpointError: Naming the file and the first keys that do not fit. The module is then in an
            undefined state and must not be used.
    """
    advice = "the file does not belong to this configuration, or is damaged; copy the checkpoint again"
    targets = module.state_dict(keep_vars=True)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            sources = {name: name for name in names} if rename is None else rename(names)
            for name in sorted(sources.keys() & targets.keys()):
                problem = _copy(file.get_tensor(sources[name]), targets[name])
                if problem:
                    raise CheckpointError(f"{path}: '{sources[name]}' {problem}; {advice}")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {advice}") from error
    # Tied weights are stored under one of their names.
    stored = {targets[name].data_ptr() for name in sources.keys() & targets.keys()}
    missing = [
        name for name, target in targets.items() if name.startswith(required) and target.data_ptr() not in stored
    ]
    unexpected = [source for name, source in sources.items() if name not in targets]
    if missing or unexpected:
        shown = [f"missing {_first(missing)}"] if missing else []
        shown += [f"unexpected {_first(unexpected)}"] if unexpected else []
        raise CheckpointError(f"{path}: keys do not match the policy, {' and '.join(shown)}; {advice}")


def _copy(source: Tensor, target: Tensor) -> str:
    """Copy values where they fit; otherwise say why they do not."""
    if source.shape != target.shape:
        return f"has shape {tuple(source.shape)}, expected {tuple(target.shape)}"
    if source.dtype != target.dtype and not {source.dtype, target.dtype} <= {*PRECISIONS}:
        return f"has dtype {source.dtype}, expected {target.dtype}"
    if not torch.isfinite(source).all():
        return "holds NaN or infinity"
    with torch.no_grad():
        target.copy_(source)
    return ""


def _first(keys: Iterable[str], limit: int = 3) -> str:
    names = sorted(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a folder so that `target` is either whole or as it was before.

    Yields a hidden folder beside `target` to write into; leaving the block without an exception syncs it
    to disk and renames it. On an exception it is removed.

    Args:
        target: The folder to appear.
        replace: Whether an existing `target` is replaced; it stays until the new one is on disk.

    Raises:
        OutputExistsError: If `target` exists and `replace` is false.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    if target.exists() and not replace:
        raise OutputExistsError(f"{target} already exists; choose another folder or remove it first")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        for path in sorted(partial.rglob("*")):
            _sync(path)
        _sync(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        _sync(target.parent)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def sweep(target: Path) -> None:
    """Clear up after processes that were killed while they wrote `target`; put an old version back that they moved."""
    for leftover in target.parent.glob(f".{target.name}.*-*"):
        kind, _, process = leftover.name.rpartition("-")
        if not process.isdigit() or (int(process) != os.getpid() and Path(f"/proc/{process}").exists()):
            continue
        if kind.endswith(".old") and not target.exists():
            leftover.rename(target)
        elif kind.endswith((".old", ".partial")):
            shutil.rmtree(leftover, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
