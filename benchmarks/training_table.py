"""The table and the picture of the training study: python benchmarks/training_table.py RESULTS [PICTURE.png]

RESULTS: the folder that benchmarks/training.sh fills, <variant>-s<seed>-k<budget>.{eval,validate}.json.
"""

import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from lerobot_grids.evaluation.statistics import wilson_interval

BUDGETS = ("4", "16", "dense")
NAMES = {"task": "task loss", "base": "as it is", "dense": "trained on"}


def collect(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(variant, budget) -> one record per seed."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*.eval.json")):
        name, budget = path.name.removesuffix(".eval.json").rsplit("-k", 1)
        variant, _, seed = name.partition("-s")
        evaluation = json.loads(path.read_text())
        curve = json.loads(path.with_name(path.name.replace(".eval.", ".validate.")).read_text())
        (row,) = curve["budgets"]
        found[re.sub(r"\d+(?=-)", "", variant), budget].append(
            {
                "seed": seed,
                "successes": evaluation["total"]["successes"],
                "episodes": evaluation["total"]["episodes"],
                "loss": row["loss"],
                "distance": row["teacher_distance"],
            }
        )
    return found


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def main(folder: str, picture: str | None = None) -> None:
    """Print the table in Markdown, and draw success against the variant."""
    found = collect(Path(folder))
    order = sorted(found, key=lambda key: (BUDGETS.index(key[1]), key[0]))
    print("| tokens | training | success | 95 % interval | by seed | validation loss | distance to the teacher |")
    print("|---|---|---|---|---|---|---|")
    bars = []
    for variant, budget in order:
        rows = found[variant, budget]
        successes, episodes = (sum(row[name] for row in rows) for name in ("successes", "episodes"))
        low, high = wilson_interval(successes, episodes)
        name = ", ".join(NAMES.get(part, part) for part in variant.split("-"))
        tokens = "all" if budget == "dense" else budget
        print(
            f"| {tokens} | {name} | {successes}/{episodes} | {100 * low:.0f} - {100 * high:.0f} % | "
            f"{', '.join(str(row['successes']) for row in rows)} | {spread([row['loss'] for row in rows])} | "
            f"{spread([row['distance'] for row in rows])} |"
        )
        bars.append((f"{tokens}: {name}", successes / episodes, low, high))
    if picture is not None:
        draw(bars, Path(picture))


def draw(bars: list[tuple[str, float, float, float]], path: Path) -> None:
    """Success rate with its interval, one row per variant."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 0.6 + 0.32 * len(bars)))
    for row, (name, rate, low, high) in enumerate(bars):
        colour = "#ee6677" if "distilled" in name else "#4477aa"
        axis.errorbar([100 * rate], [row], xerr=[[100 * (rate - low)], [100 * (high - rate)]], fmt="o", color=colour)
    axis.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axis.invert_yaxis()
    axis.set_xlabel("success, % of all episodes, with 95 % Wilson interval")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:3])
