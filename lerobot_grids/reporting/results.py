"""Read what `eval`, `compare`, `validate` and `bench` wrote, for the page."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot_grids_cards import Measurements, SuccessRow, read_measurements
from lerobot_policy_grids.errors import GridsError

from ..evaluation.statistics import wilson_interval


@dataclass(frozen=True)
class MethodRow:
    """A method of a comparison: success with its 95 % Wilson interval, and against the first method."""

    name: str
    tokens: int | None
    successes: int
    episodes: int
    low: float
    high: float
    against: str
    p: float | None
    gigaflops: float | None
    latency_ms: float | None


@dataclass
class Results:
    """All results.

    Attributes:
        measured: What `eval`, `validate` and `bench` wrote.
        methods: The methods of each comparison.
        protocols: How each comparison was made.
    """

    measured: Measurements = field(default_factory=Measurements)
    methods: list[list[MethodRow]] = field(default_factory=list)
    protocols: list[str] = field(default_factory=list)


def read_results(paths: list[Path], is_own: Callable[[str], bool]) -> Results:
    """Read result files, in any order.

    Args:
        paths: JSON files of `eval`, `compare`, `validate` and `bench`, or files with one evaluation per line.
        is_own: Whether a policy that a result names is the page's.

    Raises:
        GridsError: If a file is none of these; the message names it.
    """
    results = Results()
    for path in paths:
        try:
            if path.suffix == ".jsonl":
                lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
                for line in lines:
                    results.measured.successes += _total_first(_evaluation(line, is_own))
            elif isinstance(content := json.loads(path.read_text(encoding="utf-8")), dict) and "methods" in content:
                results.methods.append([_method(row) for row in content["methods"]])
                results.protocols.append(", ".join(f"{name} {value}" for name, value in content["protocol"].items()))
            else:
                read = read_measurements([path], is_own)
                results.measured.successes += _total_first(read.successes)
                results.measured.distances += read.distances
                results.measured.costs += read.costs
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise GridsError(
                f"{path} is not a result of eval, compare, validate or bench ({error.__cause__ or error!r}); give what "
                "their --json wrote"
            ) from error
    # The page's policy first, then the others as they came.
    results.measured.successes.sort(key=lambda row: not row.own)
    results.measured.distances.sort(key=lambda row: not row.own)
    return results


def _total_first(rows: list[SuccessRow]) -> list[SuccessRow]:
    """The sum over tasks, which comes last in a file, in front of the tasks."""
    return [*rows[-1:], *rows[:-1]]


def _evaluation(line: dict[str, Any], is_own: Callable[[str], bool]) -> list[SuccessRow]:
    """A line of benchmarks/results: outcomes of each task as 0 and 1."""
    if line.get("kind") != "evaluation":
        return []
    name = line["method"] + (f", seed {line['seed']}" if line.get("seed") is not None else "")
    given = line["episode_seeds"]
    seeds = range(given["first"], given["first"] + given["count"]) if isinstance(given, dict) else given
    outcomes = dict(line["outcomes"])
    if len(outcomes) > 1:
        outcomes["all"] = "".join(outcomes.values())
    rows = []
    for task, digits in outcomes.items():
        successes = digits.count("1")
        low, high = wilson_interval(successes, len(digits))
        own = is_own(line["policy"])
        seen = f"{seeds[0]} to {seeds[-1]}"
        rows.append(SuccessRow(name, own, line.get("tokens"), task, successes, len(digits), low, high, seen))
    return rows


def _method(row: dict[str, Any]) -> MethodRow:
    """A method in the JSON of `compare`."""
    paired = row.get("paired")
    against = ""
    if paired is not None:
        centre, low, high = (f"{100 * value:+.1f}" for value in (paired["difference"], *paired["interval"]))
        against = f"{centre} ({low} to {high})"
    return MethodRow(
        name=row["name"],
        tokens=row["num_tokens"],
        successes=row["successes"],
        episodes=row["episodes"],
        low=row["interval"][0],
        high=row["interval"][1],
        against=against,
        p=None if paired is None else paired["p"],
        gigaflops=row.get("gflops"),
        latency_ms=row.get("latency_ms"),
    )
