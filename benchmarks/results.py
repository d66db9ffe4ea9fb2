"""Read benchmarks/results/*.jsonl, one line per measurement, and print a study's table in Markdown.

    python benchmarks/results.py benchmarks/results/main.jsonl [--picture FILE.png]

benchmarks/README.md describes the lines. They hold outcomes; lerobot_grids.evaluation.statistics computes counts,
rates, intervals and tests from them.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from lerobot_grids.evaluation.statistics import paired_comparison, wilson_interval

Line = dict[str, Any]
# Two lines with equal values of these fields are the same measurement; the newer one replaces the older.
KEY = ("kind", "method", "seed", "tokens", "perturb", "tamper", "policy", "task", "command", "run", "cameras", "device")
KEYED = {
    "evaluation": (*KEY[:6], "layout"),
    "validation": KEY[:6],
    "comparison": ("kind", "perturb", "tamper"),
    "trial": ("kind", "family", "dataset", "command"),
    "fuzz": ("kind", "seed", "number"),
    "latency": ("kind", "family", "narrow", "dtype", "cameras", "tokens", "num_steps", "device", "threads", "clock"),
    "training-step": ("kind", "family", "tokens", "train", "batch_size", "gradient_checkpointing", "dtype", "device"),
    "soak": ("kind", "policy", "runtime", "minutes", "rate", "threads", "clock"),
    "libero-expert": ("kind", "suite", "task", "layout", "expert"),
}
# Costs in the line of a comparison, and their format.
COSTS = {"gflops": ".3g", "latency_ms": ".1f"}
# Fields of `lerobot-grids eval` and `validate` -> names in the lines.
NAMES = {"num_tokens": "tokens", "num_dense_tokens": "dense_tokens"}
SHARED = ("policy", "policy_type", "num_tokens", "num_dense_tokens")


def read(path: Path) -> list[Line]:
    """Read all lines of a file; an empty list if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def key(line: Line) -> tuple[Any, ...]:
    """The values that identify a measurement."""
    return tuple(line.get(name) for name in (*KEYED.get(line["kind"], KEY), "name"))


def put(path: Path, lines: list[Line]) -> None:
    """Write lines into a file: replace lines of the same measurement in place, and append new ones."""
    if not lines:
        return
    kept = {key(line): line for line in read(path)} | {key(line): line for line in lines}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in kept.values()))


def _present(line: Line) -> Line:
    """Remove empty values."""
    return {name: value for name, value in line.items() if value is not None and value not in ("", [], {})}


def evaluation_line(content: Line, method: str, seed: int | None) -> Line:
    """Make the line of a result.json of `lerobot-grids eval`, or of one evaluation in the folder of `compare`."""
    tasks, asked = content["tasks"], content.get("asked", {})
    (seeds,) = {tuple(task["seeds"]) for task in tasks}
    run = {"first": seeds[0], "count": len(seeds)}
    line = {"kind": "evaluation", "method": method, "seed": seed}
    line |= {
        NAMES.get(name, name): content.get(name) for name in (*SHARED, "reducer", "resolution", "perturb", "layout")
    }
    line |= {"tamper": ",".join(content.get("tamper", []))}
    line |= {name: content.get(name) for name in ("environment", "n_action_steps", "num_steps")}
    line |= {name: asked.get(name) for name in ("batch_size", "weights")}
    line["suites"] = {task["task"]: task["suite"] for task in tasks if task.get("suite", "") not in ("", task["task"])}
    line["episode_seeds"] = run if list(seeds) == [seeds[0] + i for i in range(len(seeds))] else list(seeds)
    line["outcomes"] = {task["task"]: "".join("01"[outcome] for outcome in task["outcomes"]) for task in tasks}
    return _present(line | {"seconds": {task["task"]: task["seconds"] for task in tasks}})


def episode_seeds(line: Line) -> list[int]:
    """The seed of each episode of a task; they are the same for every task."""
    seeds = line["episode_seeds"]
    return list(range(seeds["first"], seeds["first"] + seeds["count"])) if isinstance(seeds, dict) else seeds


def comparison_line(content: Line) -> Line:
    """Make the line of a compare.json, with the fields that do not follow from its evaluations."""
    line = {"kind": "comparison", "methods": [row["name"] for row in content["methods"]]}
    line |= {name: content["protocol"].get(name) for name in ("perturb", "tamper")}
    line |= {"device": content["methods"][0].get("device"), "threads": content["threads"], "torch": content["torch"]}
    for name in ("gflops", "latency_ms"):
        line[name] = {row["name"]: row[name] for row in content["methods"] if row.get(name) is not None}
    return _present(line)


def validation_lines(content: Line, method: str, seed: int | None) -> list[Line]:
    """Make a line for each budget in a file of `lerobot-grids validate`."""
    lines = []
    for budget in content["budgets"]:
        both = content | budget
        line = {"kind": "validation", "method": method, "seed": seed}
        names = (*SHARED, "dataset", "teacher", "frames", "num_steps", "loss", "error", "teacher_distance")
        line |= {
            NAMES.get(name, name): both.get(name)
            for name in (*names, "teacher_distance_by_action", "coordinates", "tasks")
        }
        lines.append(_present(line))
    return lines


def bench_lines(content: Line) -> list[Line]:
    """Make a line for each row in a file of `lerobot-grids bench`."""
    what = {name: value for name, value in content.items() if name != "costs"}
    rows = [{"kind": "bench"} | what | row for row in content["costs"]]
    return [_present({name: value for name, value in row.items() if name != "total_flops"}) for row in rows]


def condition(line: Line) -> str:
    """The perturbations and tamperings of a line as text."""
    parts = [line.get("perturb", ""), f"tamper:{line['tamper']}" if "tamper" in line else ""]
    return " ".join(part for part in parts if part) or "none"


def _flat(lines: list[Line]) -> list[list[bool]]:
    """Outcomes: one list per training seed, one value per episode."""
    return [[bit == "1" for bits in line["outcomes"].values() for bit in bits] for line in lines]


def _alike(ours: list[Line], theirs: list[Line]) -> bool:
    """Whether training seeds and episodes are equal, so that outcomes can be paired."""
    first, second = ([(x.get("seed"), list(x["outcomes"]), episode_seeds(x)) for x in side] for side in (ours, theirs))
    return first == second


def _interval(lines: list[Line]) -> tuple[int, int, float, float]:
    """(successes, episodes, low, high); more training seeds do not make the interval narrower."""
    outcomes = _flat(lines)
    successes, episodes = sum(map(sum, outcomes)), sum(map(len, outcomes))
    return successes, episodes, *wilson_interval(successes / len(lines), episodes // len(lines))


def _spread(values: list[float]) -> str:
    """Mean and standard deviation over training seeds as text."""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def groups(lines: list[Line]) -> dict[tuple[str, str], list[Line]]:
    """(condition, method) -> its evaluations, one per training seed."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line["kind"] == "evaluation":
            found.setdefault((condition(line), line["method"]), []).append(line)
    return found


def table(lines: list[Line]) -> list[list[str]]:
    """Rows of a study's table; the first is the header."""
    found = groups(lines)
    if not found:
        return _plain(lines)
    if len({where for where, _ in found}) > 1:
        return _by_condition(found)
    costs: Line = next((line for line in lines if "gflops" in line), {})
    tasks = list(next(iter(found.values()))[0]["outcomes"])
    validated = [line for line in lines if line["kind"] == "validation"]
    (_, first), reference = next(iter(found.items()))
    rows = [["", "tokens", *(["GFLOPs", "ms"] if costs else []), *(task.removesuffix("-v3") for task in tasks)]]
    rows[0] += ["all", "95 %", "by seed, %", *(["validation loss", "distance to the teacher"] if validated else [])]
    rows[0] += [f"against {first}, points", "p"]
    for (_, name), ours in found.items():
        successes, episodes, low, high = _interval(ours)
        row = [name, str(ours[0].get("tokens", "?"))]
        if costs:
            row += [f"{costs[kind][name]:{digits}}" if name in costs[kind] else "" for kind, digits in COSTS.items()]
        row += [str(sum(line["outcomes"].get(task, "").count("1") for line in ours)) for task in tasks]
        row += [f"{successes}/{episodes}", f"{100 * low:.0f} \u2013 {100 * high:.0f}"]
        row.append(" ".join(f"{100 * sum(bits) / len(bits):.0f}" for bits in _flat(ours)))
        if validated:
            mine = [line for line in validated if line["method"] == name]
            values = [[line[field] for line in mine if field in line] for field in ("loss", "teacher_distance")]
            row += [_spread(numbers) if numbers else "" for numbers in values]
        if ours is not reference and _alike(ours, reference):
            paired = paired_comparison(_flat(ours), _flat(reference))
            row += [paired.in_points(), f"{paired.p:.2g}"]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return rows


def _by_condition(found: dict[tuple[str, str], list[Line]]) -> list[list[str]]:
    """A row for each condition: successes of each method, their drops, and the second method against the first."""
    names = list(dict.fromkeys(name for _, name in found))
    rows = [["", *names, *(f"{name}: drop, points" for name in names)]]
    rows[0] += ["second against first, points"] if len(names) > 1 else []
    for where in dict.fromkeys(where for where, _ in found):
        here = {name: _flat(found[where, name]) for name in names if (where, name) in found}
        row = [where, *(f"{sum(map(sum, here[n]))}/{sum(map(len, here[n]))}" if n in here else "" for n in names)]
        pairs = [(here.get(name), _flat(found.get(("none", name), []))) for name in names]
        pairs += [(here.get(names[1]), here.get(names[0]))] if len(names) > 1 else []
        rows.append(row + [paired_comparison(a, b).in_points(0) if a and b else "" for a, b in pairs])
    return rows


def _plain(lines: list[Line]) -> list[list[str]]:
    """A table with all fields of other lines."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    return [names, *([str(line.get(name, "")) for name in names] for line in lines)]


def markdown(rows: list[list[str]]) -> str:
    """Format rows as a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def draw(lines: list[Line], path: Path) -> None:
    """Plot success with its interval, one row per method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    found = groups(lines)
    figure, axis = pyplot.subplots(figsize=(7, 0.6 + 0.32 * len(found)))
    for row, ours in enumerate(found.values()):
        successes, episodes, low, high = (100 * value for value in _interval(ours))
        rate = 100 * successes / episodes
        axis.errorbar([rate], [row], xerr=[[rate - low], [high - rate]], fmt="o", color="#4477aa")
    axis.set_yticks(range(len(found)), [name if where == "none" else f"{name}, {where}" for where, name in found])
    axis.invert_yaxis()
    axis.set_xlabel("success, % of all episodes, with 95 % Wilson interval")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a file of benchmarks/results, or one that study.py wrote")
    parser.add_argument("--picture", type=Path, help="also draw success with its intervals")
    asked = parser.parse_args()
    measured = read(asked.file)
    print(markdown(table(measured)))
    if asked.picture is not None:
        draw(measured, asked.picture)
