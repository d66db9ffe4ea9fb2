"""Progress bars, findings and JSON files of the commands."""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lerobot_policy_grids.checkpoint import atomic_file

from .preflight import Finding, refuse_errors


class CountingBar:
    """A progress bar over a number of things, and the time it took."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task
        self._start = time.perf_counter()
        self.seconds = 0.0

    def expect(self, total: int) -> None:
        """Set the total."""
        self._progress.update(self._task, total=total)

    def advance(self, count: int = 1, title: str | None = None) -> None:
        """Count some more as done."""
        self._progress.advance(self._task, count)
        if title is not None:
            self._progress.update(self._task, description=title)
        self.seconds = time.perf_counter() - self._start


def progress_columns(title: str, unit: str) -> tuple[ProgressColumn, ...]:
    """Columns of every progress bar."""
    return (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


@contextmanager
def counting_bar(title: str, total: int | None, unit: str) -> Iterator[CountingBar]:
    """Show a progress bar on standard error while the block runs; `expect` sets a total that is not known yet."""
    with Progress(*progress_columns("{task.description}", unit), console=Console(stderr=True)) as progress:
        yield CountingBar(progress, progress.add_task(title, total=total))


def report(findings: Iterable[Finding]) -> None:
    """Print a line for each warning on standard error, and raise `PreflightError` if there are errors."""
    found = list(dict.fromkeys(findings))
    for finding in found:
        if not finding.is_error:
            print(f"lerobot-grids: warning: {finding.line}", file=sys.stderr)
    refuse_errors(found)


def require_writable(path: Path) -> None:
    """Raise `OSError` unless a file can be written there; its folder is made."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} is not writable; choose another folder")


def write_json(path: str | Path | None, content: dict[str, Any]) -> None:
    """Write `content` where a path was given, all of it or nothing."""
    if path is not None:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n")


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for a table that a file or a log should hold whole."""
    console = Console()
    return console if console.is_terminal else Console(width=120)
