"""The curves of a training run, from its CSV logs, as SVG pictures that follow the page's colours."""

import csv
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]
# Of text and axes: replaced by the page's own colour. Nothing else is drawn in it.
PLACEHOLDER = "#010203"
COLOURS = ("#3d85c6", "#e0762f", "#3f9f5f")
SIZE = (4.2, 2.7)
# Title -> (columns of the log and what they are called, unit of the axis).
CHARTS: dict[str, tuple[dict[str, str], str]] = {
    "Loss": ({"train/loss": "training", "val/loss": "held out"}, "loss"),
    "Token budget": ({"train/num_tokens": "K"}, "visual tokens per camera"),
    "Distance to the dense teacher": (
        {"train/distillation": "training", "val/distillation": "held out", "val/chunk_distance": "action chunks"},
        "distance",
    ),
    "How far points move": (
        {"coordinates/motion": "from image to image", "coordinates/drift": "from their anchors"},
        "cells",
    ),
    "Points at the border or on each other": (
        {"coordinates/border": "at the border", "coordinates/duplicates": "on another point"},
        "share of the points",
    ),
    "Learning rate": ({"train/lr": "learning rate"}, ""),
}
# More marks than this are not drawn: a line says as much.
MARKED = 40


@dataclass(frozen=True)
class Chart:
    """A picture, and what it says in words: the last value of each line, or the range of dots."""

    title: str
    svg: str
    caption: str


def read_logs(run: Path) -> dict[str, Points]:
    """Column -> (step, value) of every CSV log of a run; a resumed run has several, whose later steps win.

    Args:
        run: Output folder of a training run.
    """
    found: dict[str, dict[float, float]] = {}
    for path in sorted((run / "logs").glob("csv*/metrics.csv"), key=_number):
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                step = _value(row.get("step"))
                for name, text in row.items():
                    value = _value(text)
                    if step is not None and value is not None and isinstance(name, str):
                        found.setdefault(name, {})[step] = value
    return {name: sorted(values.items()) for name, values in found.items()}


def _number(path: Path) -> int:
    text = path.parent.name.partition("-")[2]
    return int(text) if text.isdigit() else 1


def _value(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def training_charts(run: Path) -> list[Chart]:
    """The charts for which a run has logs."""
    logs = read_logs(run)
    charts = []
    for title, (columns, unit) in CHARTS.items():
        lines = {label: logs[name] for name, label in columns.items() if logs.get(name)}
        if lines:
            charts.append(chart(title, lines, "training step", unit, dots=title == "Token budget"))
    return charts


def budget_chart(title: str, lines: dict[str, Points], unit: str) -> Chart:
    """A chart over the number of tokens."""
    return chart(title, lines, "visual tokens per camera", unit, counts=True)


def chart(
    title: str, lines: dict[str, Points], along: str, unit: str, *, dots: bool = False, counts: bool = False
) -> Chart:
    """Draw lines.

    Args:
        title: Of the chart.
        lines: Label -> (x, y). Labels are this project's own: matplotlib reads formulas between dollar signs.
        along: Label of the x axis.
        unit: Label of the y axis.
        dots: Whether values are not joined by lines.
        counts: Whether x counts tokens: spaced by ratio, and each count is named.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    inks = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), PLACEHOLDER)
    # Text stays text; equal pages have equal names inside.
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, **inks}
    with mpl.rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=SIZE, layout="constrained")
        axis = figure.subplots()
        for (label, points), colour in zip(lines.items(), COLOURS, strict=False):
            x, y = zip(*points, strict=True)
            mark = "o" if dots or len(points) <= MARKED else ""
            axis.plot(x, y, mark, linestyle="none" if dots else "-", markersize=3, color=colour, label=label)
        if counts:
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.minorticks_off()
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if unit.startswith("share"):
            axis.set_ylim(0, max(0.1, axis.get_ylim()[1]))
        axis.set_xlabel(along)
        axis.set_ylabel(unit)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axis.legend(frameon=False, labelcolor=PLACEHOLDER)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    values = {label: [y for _, y in points] for label, points in lines.items()}
    said = {
        label: " to ".join(dict.fromkeys((f"{min(each):.4g}", f"{max(each):.4g}")))
        if dots or counts
        else f"{each[-1]:.4g}"
        for label, each in values.items()
    }
    words = ", ".join(f"{label} {text}" for label, text in said.items())
    caption = words if dots or counts else f"last: {words}"
    return Chart(title, _embedded(text.getvalue(), f"{title}: {caption}"), caption)


def _embedded(svg: str, said: str) -> str:
    """An SVG element for a page: its size follows the page, its ink is the page's, and it says what it shows."""
    # Who made it, in namespaces that are addresses.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg[svg.index("<svg") :].replace(PLACEHOLDER, "currentColor").split(">", 1)
    view = next(part for part in head.split('"') if part.count(" ") == 3 and part.startswith("0 0 "))
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{view}" role="img" aria-label="{said}">{rest}'.strip()
