"""Write files and folders completely or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputExistsError


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Write a file so that `target` is either complete or unchanged.

    Yields a hidden path beside `target` to write to. When the block ends without an exception, the file is synced to
    disk and renamed; after an exception it is removed.
    """
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield partial
        _sync(partial)
        partial.replace(target)
        _sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a folder so that `target` is either complete or unchanged.

    Yields a hidden folder beside `target` to write into. When the block ends without an exception, the folder is
    synced to disk and renamed; after an exception it is removed.

    Args:
        target: The folder to write.
        replace: Whether an existing `target` is replaced; it stays until the new folder is on disk.

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
    """Remove what killed processes left beside `target`, and restore an old version that they had moved away."""
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
