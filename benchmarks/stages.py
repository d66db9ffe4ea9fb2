"""Draw where the time of an action chunk goes, by latency.py's results: python benchmarks/stages.py docs/stages.png"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import results as kept
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "latency.jsonl"
FAMILIES = {"pi0": "π0", "smolvla": "SmolVLA"}
# Row of the results -> what it is called in the picture.
ROWS = {
    "LeRobot dense": "all tokens, LeRobot",
    "K=16": "16 tokens",
    "K=16 fast": "16 tokens, fast path",
    "K=16 L=9": "16 tokens, read after layer 9 of 27",
    "K=16 L=4": "16 tokens, read after layer 4 of 12",
}
COLOURS = {"vision tower": "#4477aa", "trunk": "#ee6677", "denoising steps": "#ccbb44"}


def seconds(row: dict[str, Any]) -> dict[str, float]:
    """Stage -> median seconds, in the order in which they run."""
    vision, prefill, steps = (median(row["seconds"][stage]) for stage in ("vision", "prefill", "steps"))
    return dict(zip(COLOURS, (vision, prefill - vision, steps), strict=True))


def together(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each measurement with all of its rows, which are written one by one; without refused ones."""
    found: dict[Any, dict[str, Any]] = {}
    for line in lines:
        own = found.setdefault(kept.key(line | {"name": None}), line | {"rows": []})
        own["rows"] += [row for row in line["rows"] if row.get("refused") is None]
    return list(found.values())


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw a bar for each way to act."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, line in zip(figure.subplots(len(lines), sharex=True), lines, strict=True):
        measured = [row for row in line["rows"] if row["name"] in ROWS]
        names, rows = [ROWS[row["name"]] for row in measured], [seconds(row) for row in measured]
        left = [0.0] * len(rows)
        for stage, colour in COLOURS.items():
            widths = [row[stage] for row in rows]
            axis.barh(names, widths, left=left, color=colour, label=stage)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        totals = [f"{median(row['seconds']['total']):.1f} s" for row in measured]
        axis.bar_label(axis.containers[-1], totals, padding=4)
        axis.set_title(FAMILIES[line["family"]], loc="left")
        axis.set_xlim(0, 24)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, loc="lower right")
    figure.axes[-1].set_xlabel("seconds of one CPU thread for one action chunk")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="PNG file to write")
    lines = together(kept.read(RESULTS))
    draw([line for line in lines if line["family"] in FAMILIES and not line["narrow"]], parser.parse_args().picture)


if __name__ == "__main__":
    main()
