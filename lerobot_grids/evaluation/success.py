"""Success of a policy: counts, rates with intervals, and the outcome of every episode."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..console import write_json
from .statistics import wilson_interval


@dataclass
class TaskResult:
    """Success on one task or several: counts, the rate with its 95 % Wilson interval, and every outcome."""

    task: str
    successes: int
    episodes: int
    success_rate: float
    interval: tuple[float, float]
    seconds: float
    seeds: list[int]
    outcomes: list[bool]
    suite: str = ""


@dataclass
class Evaluation:
    """Success on each task, and the options of the evaluation.

    Attributes:
        policy: Name of the policy.
        policy_type: LeRobot's type of the policy.
        num_tokens: Visual tokens per camera.
        num_dense_tokens: Visual tokens per camera of the dense policy.
        tasks: Success on each task.
        environment: LeRobot's type of the environment.
        n_action_steps: Steps of a chunk that are executed before the next observation.
        num_steps: Integration steps of the flow for one action chunk; None for a policy without one.
        perturb: Perturbations as kind:severity, comma-separated; empty for none.
        layout: Where LIBERO's objects stand, "official" or "dealt"; empty in other environments.
        tamper: Names of the changes to the policy's input.
        reducer: Name of the reducer applied to a dense policy without training; empty for none.
        resolution: Side in pixels of the images given to a dense policy without training; None for its own size.
    """

    policy: str
    policy_type: str
    num_tokens: int | None
    num_dense_tokens: int | None
    tasks: list[TaskResult] = field(default_factory=list)
    environment: str = ""
    n_action_steps: int | None = None
    num_steps: int | None = None
    perturb: str = ""
    layout: str = ""
    tamper: list[str] = field(default_factory=list)
    reducer: str = ""
    resolution: int | None = None

    @property
    def suites(self) -> list[TaskResult]:
        """Success on each suite; empty if no suite has several tasks."""
        names = list(dict.fromkeys(task.suite for task in self.tasks))
        if len(names) == len(self.tasks):
            return []
        return [_together(name, [task for task in self.tasks if task.suite == name]) for name in names]

    @property
    def total(self) -> TaskResult:
        """Success on all tasks together."""
        return _together("all", self.tasks)

    def save(self, path: Path, **more: Any) -> None:
        """Write all results, and the fields in `more`, as JSON."""
        sums = {"suites": [asdict(suite) for suite in self.suites], "total": asdict(self.total)}
        write_json(path, asdict(self) | sums | more)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Evaluation":
        """Read a saved evaluation; entries that are not fields are ignored."""
        own = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        return cls(**own | {"tasks": [TaskResult(**task) for task in content["tasks"]]})


def summarise(task: str, outcomes: list[bool], seeds: list[int], seconds: float, suite: str = "") -> TaskResult:
    """Count outcomes and compute the interval of their rate."""
    successes, episodes = sum(outcomes), len(outcomes)
    interval = wilson_interval(successes, episodes)
    return TaskResult(task, successes, episodes, successes / episodes, interval, seconds, seeds, outcomes, suite)


def _together(name: str, tasks: list[TaskResult]) -> TaskResult:
    outcomes = [outcome for task in tasks for outcome in task.outcomes]
    seeds = [seed for task in tasks for seed in task.seeds]
    return summarise(name, outcomes, seeds, sum(task.seconds for task in tasks))
