"""Read the results for a card from the JSON files of `eval`, `validate` and `bench`.

The card shows only values that the files hold. Of a local folder it shows only the last part of the path.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Name of the sum over tasks in the files of `eval`.
ALL_TASKS = "all"


@dataclass(frozen=True)
class SuccessRow:
    """Closed-loop success on one task: counts, 95 % Wilson interval, and the seeds of the episodes.

    `own` is true for the policy of the card and false for policies it is compared with. `num_steps` are the denoising
    steps of one action chunk; None where the policy has none, or the result does not say.
    """

    policy: str
    own: bool
    tokens: int | None
    task: str
    successes: int
    episodes: int
    low: float
    high: float
    seeds: str
    num_steps: int | None = None


@dataclass(frozen=True)
class DistanceRow:
    """Held-out loss, and distance to the dense teacher, at one budget."""

    policy: str
    own: bool
    tokens: int | None
    frames: int
    loss: float
    teacher_distance: float | None


@dataclass(frozen=True)
class CostRow:
    """Costs of one action chunk at one budget, by stage; milliseconds are None if not measured."""

    name: str
    visual_tokens: int
    gigaflops: dict[str, float]
    total_gigaflops: float
    latency_ms: float | None
    latency_p95_ms: float | None
    peak_memory_mib: float | None


@dataclass(frozen=True)
class Costs:
    """Results of one run of `bench`."""

    policy: str
    cameras: int
    language_tokens: int
    device: str | None
    dtype: str | None
    rows: list[CostRow]


@dataclass
class Measurements:
    """All results of a card."""

    successes: list[SuccessRow] = field(default_factory=list)
    distances: list[DistanceRow] = field(default_factory=list)
    costs: list[Costs] = field(default_factory=list)
    # N, if a result of this policy has it.
    num_dense_tokens: int | None = None


def read_measurements(paths: list[Path], is_own: Callable[[str], bool]) -> Measurements:
    """Read result files.

    Args:
        paths: JSON files of `eval`, `validate` and `bench`, in any order.
        is_own: Returns whether a policy named in a result is the policy of the card.

    Raises:
        ValueError: If a file is not such a result; the message names it.
    """
    found = Measurements()
    for path in paths:
        try:
            content = json.loads(path.read_text())
            if "tasks" in content:
                _read_success(content, is_own, found)
            elif "budgets" in content:
                _read_distance(content, is_own, found)
            else:
                found.costs.append(_read_costs(content))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a result of eval, validate or bench ({error!r}); give their JSON"
            ) from error
    # Put the policy of the card first.
    found.successes.sort(key=lambda row: not row.own)
    found.distances.sort(key=lambda row: not row.own)
    return found


def _read_success(content: dict[str, Any], is_own: Callable[[str], bool], found: Measurements) -> None:
    changed = [f"by {content['reducer']} without training"] if content.get("reducer") else []
    changed += [f"at {content['resolution']} px without training"] if content.get("resolution") else []
    # With token reduction that was not trained, the result is not one of the pushed policy.
    own = is_own(content["policy"]) and not changed
    # Show suites instead of tasks, because LIBERO has forty tasks.
    parts = content.get("suites") or content["tasks"]
    rows = parts if len(parts) == 1 else [*parts, content["total"]]
    # Perturbations and tamperings are named with the task, so that results are not confused.
    spoiled = [f"{name} spoiled" for name in content.get("tamper") or ()]
    condition = ", ".join(filter(None, [*changed, content.get("perturb"), *spoiled]))
    for row in rows:
        seeds = sorted(set(row["seeds"]))
        found.successes.append(
            SuccessRow(
                policy=Path(content["policy"]).name,
                own=own,
                tokens=content["num_tokens"],
                task=f"{row['task']} ({condition})" if condition else row["task"],
                successes=row["successes"],
                episodes=row["episodes"],
                low=row["interval"][0],
                high=row["interval"][1],
                seeds=f"{seeds[0]} to {seeds[-1]}",
                num_steps=content.get("num_steps"),
            )
        )
    if own:
        found.num_dense_tokens = content["num_dense_tokens"]


def _read_distance(content: dict[str, Any], is_own: Callable[[str], bool], found: Measurements) -> None:
    for row in content["budgets"]:
        found.distances.append(
            DistanceRow(
                policy=Path(content["policy"]).name,
                own=is_own(content["policy"]),
                tokens=row["num_tokens"],
                frames=content["frames"],
                loss=row["loss"],
                teacher_distance=row["teacher_distance"],
            )
        )


def _read_costs(content: dict[str, Any]) -> Costs:
    rows = []
    for row in content["costs"]:
        latency = row.get("latency_ms") or {}
        rows.append(
            CostRow(
                name=row["name"],
                visual_tokens=row["visual_tokens"],
                gigaflops={stage: flops / 1e9 for stage, flops in row["flops"].items()},
                total_gigaflops=row["total_flops"] / 1e9,
                latency_ms=latency.get("total"),
                latency_p95_ms=row.get("latency_p95_ms"),
                peak_memory_mib=row.get("peak_memory_mib"),
            )
        )
    measured = any(row.latency_ms is not None for row in rows)
    return Costs(
        policy=content["policy"],
        cameras=content["cameras"],
        language_tokens=content["language_tokens"],
        device=content.get("device") if measured else None,
        dtype=content.get("dtype") if measured else None,
        rows=rows,
    )
