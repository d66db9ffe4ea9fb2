"""Show results of `eval`, `validate` and `compare`: tables on the screen or in Markdown, and a picture."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from ..console import wide_console
from .paired import ComparisonResult, MethodResult

MARKERS = "osD^vP*X"


def header(result: ComparisonResult) -> list[str]:
    """Column names of the table."""
    tasks = list(result.methods[0].by_task)
    costs = ["GFLOPs", "ms"] if result.methods[0].gflops is not None else []
    return ["method", "tokens", *costs, *tasks, "all", "95 %", "by seed, %", "against the first, points", "p"]


def cells(row: MethodResult) -> list[str]:
    """The table row of a method."""
    low, high = row.interval
    texts = [row.name, "?" if row.num_tokens is None else str(row.num_tokens)]
    if row.gflops is not None and row.latency_ms is not None:
        texts += [f"{row.gflops:.3g}", f"{row.latency_ms:.1f}"]
    texts += [f"{successes}/{episodes}" for successes, episodes in row.by_task.values()]
    texts += [f"{row.successes}/{row.episodes}", f"{100 * low:.0f} - {100 * high:.0f}"]
    texts.append(" ".join(f"{100 * rate:.0f}" for rate in row.by_seed))
    if row.paired is None:
        return [*texts, "", ""]
    return [*texts, row.paired.in_points(), f"{row.paired.p:.2g}"]


def print_methods(result: ComparisonResult) -> None:
    """Print the table."""
    table = Table(title=f"{', '.join(f'{name} {value}' for name, value in result.protocol.items())}")
    for number, name in enumerate(header(result)):
        table.add_column(name, justify="left" if number == 0 else "right")
    for row in result.methods:
        table.add_row(*cells(row))
    console = wide_console()
    console.width = max(console.width, 160)
    console.print(table)


def markdown(result: ComparisonResult) -> str:
    """The table as Markdown."""
    names = header(result)
    lines = [names, ["---"] * len(names), *(cells(row) for row in result.methods)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw_methods(result: ComparisonResult, path: Path) -> None:
    """Plot success over visual tokens, and over milliseconds if they were measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    axes_of = [("visual tokens per camera", "num_tokens", "symlog")]
    if result.methods[0].latency_ms is not None:
        axes_of.append((f"milliseconds per action chunk on {result.methods[0].device}", "latency_ms", "linear"))
    figure, axes = pyplot.subplots(
        1, len(axes_of), figsize=(7.5 * len(axes_of), 6), sharey=True, squeeze=False, layout="constrained"
    )
    colours = pyplot.get_cmap("tab20")
    for axis, (label, name, scale) in zip(axes[0], axes_of, strict=True):
        # Methods with equal budgets are drawn side by side instead of over each other.
        places: dict[float, int] = {}
        for number, row in enumerate(result.methods):
            value = getattr(row, name)
            if value is None:
                continue
            shift = places.get(value, 0) if name == "num_tokens" else 0
            places[value] = shift + 1
            low, high = row.interval
            axis.errorbar(
                [value * 1.05 ** ((shift + 1) // 2 * (-1) ** shift) if value else 0.06 * shift],
                [100 * row.rate],
                yerr=[[100 * (row.rate - low)], [100 * (high - row.rate)]],
                fmt=MARKERS[number % len(MARKERS)],
                markersize=7,
                color=colours(number % 20),
                label=row.name,
            )
        axis.set_xscale(scale)
        if name == "num_tokens":
            counts = sorted({row.num_tokens for row in result.methods if row.num_tokens is not None})
            axis.set_xticks(counts, [str(count) for count in counts], minor=False)
            axis.set_xticks([], minor=True)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("success, % with 95 % Wilson interval")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def print_evaluation(result: Any) -> None:
    """Print an `Evaluation` as a table."""
    tokens = "?" if result.num_tokens is None else f"{result.num_tokens} of {result.num_dense_tokens}"
    title = f"{result.policy} ({result.policy_type}), {tokens} visual tokens per camera"
    if result.num_steps is not None:
        title += f", {result.num_steps} flow steps"
    if result.layout:
        title += f"\nlayout: {result.layout}"
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
            # With fewer episodes, tenths of a percent have no meaning.
            f"{100 * row.success_rate:.{1 if row.episodes >= 200 else 0}f} %",
            f"{100 * low:.0f} - {100 * high:.0f} %",
            f"{row.seconds:.0f}",
        )
    wide_console().print(table)


def print_validation(result: Any) -> None:
    """Print a `Validation` as a table."""
    table = Table(title=f"{result.policy} ({result.policy_type}) on {result.frames} held-out frames")
    names = ["tokens", "loss", "error, by action"]
    if result.teacher is not None:
        names += ["distance to teacher", "by action"]
    # A terminal is too narrow for all statistics; the JSON has them.
    wanted = ("border", "duplicates", "drift", "motion", "on_object", "anchors_on_object")
    shown = [name for name in wanted if name in result.budgets[0].coordinates]
    names += shown
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in result.budgets:
        cells = ["all" if row.num_tokens is None else str(row.num_tokens), f"{row.loss:.4f}", _numbers(row.error)]
        if result.teacher is not None:
            cells += [f"{row.teacher_distance:.3f}", _numbers(row.teacher_distance_by_action)]
        table.add_row(*cells, *(f"{row.coordinates[name]:.2f}" for name in shown))
    console = wide_console()
    console.print(table)
    console.print("error and distance: root mean squared; distance in standard deviations, by action in its own units")
    for row in result.budgets:
        if row.tasks:
            console.print(_task_points(row.num_tokens, row.tasks))


def _task_points(num_tokens: int, tasks: dict[str, Any]) -> Table:
    """Where the points are in the frames of each task: a column for what is known of any."""
    table = Table(title=f"where {num_tokens} tokens look, by task")
    table.add_column("instruction")
    rows = [asdict(points) for points in tasks.values()]
    shown = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    for name in shown:
        # Narrow columns leave room for the instructions.
        table.add_column(name.replace("_", "\n"), justify="right")
    for task, row in zip(tasks, rows, strict=True):
        cells = ["-" if row[name] is None else f"{row[name]:.{0 if name == 'frames' else 2}f}" for name in shown]
        table.add_row(task, *cells)
    return table


def _numbers(values: list[float]) -> str:
    shown = " ".join(f"{value:.3g}" for value in values[:8])
    return shown + (" ..." if len(values) > 8 else "")
