"""Progress bars, tables and JSON files of the commands."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class CountingBar:
    """A progress bar over a known number of things, and the time it took."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task
        self._start = time.perf_counter()
        self.seconds = 0.0

    def expect(self, total: int) -> None:
        """So many things there will be."""
        self._progress.update(self._task, total=total)

    def advance(self, count: int = 1, title: str | None = None) -> None:
        """So many more are done."""
        self._progress.advance(self._task, count)
        if title is not None:
            self._progress.update(self._task, description=title)
        self.seconds = time.perf_counter() - self._start


@contextmanager
def counting_bar(title: str, total: int | None, unit: str) -> Iterator[CountingBar]:
    """Show a progress bar on standard error while the block runs; `expect` tells a total that is not known yet."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield CountingBar(progress, progress.add_task(title, total=total))


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
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(file)


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for a table that a file or a log should hold whole."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def print_evaluation(result: Any) -> None:
    """Show an `Evaluation` as a table."""
    from rich.table import Table

    tokens = "?" if result.num_tokens is None else f"{result.num_tokens} of {result.num_dense_tokens}"
    title = f"{result.policy} ({result.policy_type}), {tokens} visual tokens per camera"
    if result.perturb:
        title += f"\nperturbed: {result.perturb}"
    if result.tamper:
        title += f"\ntampered with: {', '.join(result.tamper)}"
    table = Table(title=title)
    table.add_column("task")
    for name in ("success", "rate", "95 % interval", "seconds"):
        table.add_column(name, justify="right")
    rows = [*result.tasks, *result.suites, result.total] if len(result.tasks) > 1 else result.tasks
    for row in rows:
        low, high = row.interval
        table.add_row(
            row.task,
            f"{row.successes}/{row.episodes}",
            # A tenth of a percent means something from some hundred episodes on.
            f"{100 * row.success_rate:.{1 if row.episodes >= 200 else 0}f} %",
            f"{100 * low:.0f} - {100 * high:.0f} %",
            f"{row.seconds:.0f}",
        )
    wide_console().print(table)


def print_validation(result: Any) -> None:
    """Show a `Validation` as a table."""
    from rich.table import Table

    table = Table(title=f"{result.policy} ({result.policy_type}) on {result.frames} held-out frames")
    names = ["tokens", "loss", "error, by action"]
    if result.teacher is not None:
        names += ["distance to teacher", "by action"]
    # All of them are in the JSON; a terminal is not that wide.
    shown = [name for name in ("border", "duplicates", "drift", "motion") if name in result.budgets[0].coordinates]
    names += shown
    for name in names:
        table.add_column(name, justify="right")
    for row in result.budgets:
        cells = ["all" if row.num_tokens is None else str(row.num_tokens), f"{row.loss:.4f}", _numbers(row.error)]
        if result.teacher is not None:
            cells += [f"{row.teacher_distance:.3f}", _numbers(row.teacher_distance_by_action)]
        table.add_row(*cells, *(f"{row.coordinates[name]:.2f}" for name in shown))
    console = wide_console()
    console.print(table)
    console.print("error and distance: root mean squared; distance in standard deviations, by action in its own units")


def _numbers(values: list[float]) -> str:
    shown = " ".join(f"{value:.3g}" for value in values[:8])
    return shown + (" ..." if len(values) > 8 else "")
