"""The table of benchmarks/perturbed.sh: python benchmarks/perturbed_table.py FOLDER

Success of each policy under each perturbation and each spoiled input, and the drop from the unperturbed episodes.
"""

import json
import sys
from pathlib import Path

from lerobot_grids.evaluation.statistics import paired_comparison


def outcomes(folder: Path, name: str) -> list[bool]:
    """Every episode of a policy, in the order of tasks and seeds."""
    evaluation = json.loads((folder / f"{name}-0.json").read_text())
    return [outcome for task in evaluation["tasks"] for outcome in task["outcomes"]]


def main(folder: Path) -> None:
    """Write FOLDER/perturbed.md."""
    clean = json.loads((folder / "none" / "compare.json").read_text())
    names = [method["name"] for method in clean["methods"]]
    folders = [path.parent for path in folder.glob("*/compare.json")]
    conditions = sorted(folders, key=lambda path: (path.name != "none", path.name))
    lines = [["", *names, *(f"{name}: drop, points" for name in names), "second against first, points"]]
    lines.append(["---"] * len(lines[0]))
    for condition in conditions:
        row, drops = [condition.name.replace("-", ":")], []
        for name in names:
            here = outcomes(condition, name)
            row.append(f"{sum(here)}/{len(here)}")
            drops.append(paired_comparison([here], [outcomes(folder / "none", name)]).in_points(0))
        apart = paired_comparison([outcomes(condition, names[1])], [outcomes(condition, names[0])])
        lines.append([*row, *drops, apart.in_points(0)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    (folder / "perturbed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
