"""Write files and folders completely or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from ..errors import DiskFullError, GridsError, OutputExistsError, causes

# What libraries say about a full disk when their errors have no number: safetensors, and torch's own writer.
FULL_DISK_WORDS = ("os error 28)", "os error 122)", "unexpected pos")

# Threads of this process may write to one target at the same time.
_numbers = count()
_in_use: set[Path] = set()


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Write a file so that `target` is either complete or unchanged.

    Yields a hidden path beside `target` to write to. When the block ends without an exception, the file is synced to
    disk and renamed; after an exception it is removed.

    Raises:
        DiskFullError: If the disk is full.
    """
    with _hidden(target, "partial") as partial, naming(partial, target):
        yield partial
        _sync(partial)
        partial.replace(target)
        _sync(target.parent)


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a folder so that `target` is either complete or unchanged.

    Yields a hidden folder beside `target` to write into. When the block ends without an exception, the folder is
    synced to disk and renamed; after an exception it is removed.

    Args:
        target: The folder to write.
        replace: Whether an existing `target` is replaced; it stays until the new folder is on disk.

    Raises:
        OutputExistsError: If `target` exists and `replace` is false, also if another process wrote it meanwhile.
        DiskFullError: If the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    if not replace:
        require_absent(target)
    with _hidden(target, "old") as old, _hidden(target, "partial") as partial, naming(partial, target):
        try:
            partial.mkdir()
            yield partial
            _sync_all(partial)
            if not replace:
                require_absent(target)
            elif target.exists():
                target.rename(old)
            _move(partial, target)
            _sync(target.parent)
        finally:
            if old.exists() and not target.exists():
                old.rename(target)


@contextmanager
def atomic_files(folder: Path) -> Iterator[Path]:
    """Write some files of an existing folder; those that are there stay until all new ones are on disk.

    Yields a hidden folder inside `folder` to write into.

    Raises:
        DiskFullError: If the disk is full.
    """
    target = folder / "files"
    sweep(target)
    with _hidden(target, "partial", folder) as partial, naming(partial, folder):
        partial.mkdir()
        yield partial
        _sync_all(partial)
        for path in sorted(partial.iterdir()):
            path.replace(folder / path.name)
        _sync(folder)


def sweep(target: Path) -> None:
    """Remove what killed processes left beside `target`, and restore an old version that they had moved away."""
    for leftover in target.parent.glob(f".{target.name}.*-*"):
        kind, _, process = leftover.name.rpartition("-")
        if not process.isdigit() or leftover in _in_use:
            continue
        if int(process) != os.getpid() and Path(f"/proc/{process}").exists():
            continue
        if kind.endswith(".old") and not target.exists():
            leftover.rename(target)
        elif kind.endswith((".old", ".partial")):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def explaining_a_full_disk(what: str, where: Path) -> Iterator[None]:
    """Turn any error of a full disk into a `DiskFullError`.

    Args:
        what: What is written in the block.
        where: A folder on its disk.
    """
    try:
        yield
    except Exception as error:  # each library has its own
        if isinstance(error, GridsError) or not is_full_disk(error):
            raise
        free = shutil.disk_usage(where).free // 2**20
        raise DiskFullError(
            f"{what} cannot be written: the disk of {where} is full ({free:,} MiB free) and nothing was changed; "
            "make room there, then run this again"
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, means that a disk or the user's share of it is full."""
    return any(
        getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or (not isinstance(cause, OSError) and any(words in str(cause) for words in FULL_DISK_WORDS))
        for cause in causes(error)
    )


@contextmanager
def naming(path: Path, shown: str | Path) -> Iterator[None]:
    """Let the errors of a block name `shown`, which the user knows, in the place of a hidden path."""
    try:
        yield
    except GridsError as error:
        text = str(error).replace(str(path), str(shown))
        if text == str(error):
            raise
        raise type(error)(text) from error
    except OSError as error:
        for attribute in ("filename", "filename2"):
            if isinstance(seen := getattr(error, attribute), str):
                setattr(error, attribute, seen.replace(str(path), str(shown)))
        raise


@contextmanager
def _hidden(target: Path, kind: str, shown: Path | None = None) -> Iterator[Path]:
    """Yield a hidden path beside `target` that nobody else uses, and remove what is there in the end.

    The error of a full disk names `shown`, or `target`.
    """
    path = target.with_name(f".{target.name}.{next(_numbers)}.{kind}-{os.getpid()}")
    _in_use.add(path)
    # Outside, so that the free space is what is free without the unfinished file.
    with explaining_a_full_disk(str(shown or target), target.parent):
        try:
            yield path
        finally:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            _in_use.discard(path)


def require_absent(target: Path) -> None:
    """Raise `OutputExistsError` if there is something."""
    if target.exists():
        raise OutputExistsError(f"{target} already exists; choose another folder or remove it first")


def _move(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise OutputExistsError(f"{target} was written by somebody else meanwhile; choose another folder") from error


def _sync_all(folder: Path) -> None:
    for path in (*sorted(folder.rglob("*")), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
