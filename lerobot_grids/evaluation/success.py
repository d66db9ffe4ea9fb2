"""Success of a policy: counts, rates with their intervals, and every episode's outcome."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..console import write_json
from .statistics import wilson_interval


@dataclass
class TaskResult:
    """Success of one task, or of several: counts, the rate with its 95 % Wilson interval, every episode's outcome."""

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
    """Success over tasks, with what was evaluated.

    Attributes:
        policy: Its name.
        policy_type: LeRobot's type of it.
        num_tokens: Visual tokens per camera.
        num_dense_tokens: Those of its dense policy.
        tasks: Success of each task.
        environment: LeRobot's type of it.
        n_action_steps: Steps of a chunk that are executed before the policy looks again.
        perturb: Perturbations as kind:severity, comma-separated; empty for none.
        tamper: What was spoiled in the policy's input.
        reducer: What reduced the tokens of a dense policy without training; empty for nothing.
        resolution: Side in pixels at which a dense policy saw its images without training; None for its own.
    """

    policy: str
    policy_type: str
    num_tokens: int | None
    num_dense_tokens: int | None
    tasks: list[TaskResult] = field(default_factory=list)
    environment: str = ""
    n_action_steps: int | None = None
    perturb: str = ""
    tamper: list[str] = field(default_factory=list)
    reducer: str = ""
    resolution: int | None = None

    @property
    def suites(self) -> list[TaskResult]:
        """Each suite's tasks together; empty where no suite has several tasks."""
        names = list(dict.fromkeys(task.suite for task in self.tasks))
        if len(names) == len(self.tasks):
            return []
        return [_together(name, [task for task in self.tasks if task.suite == name]) for name in names]

    @property
    def total(self) -> TaskResult:
        """All tasks together."""
        return _together("all", self.tasks)

    def save(self, path: Path, **more: Any) -> None:
        """Write everything, and what else is given, as JSON."""
        sums = {"suites": [asdict(suite) for suite in self.suites], "total": asdict(self.total)}
        write_json(path, asdict(self) | sums | more)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Evaluation":
        """What was saved; entries that are no fields are left out."""
        own = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        return cls(**own | {"tasks": [TaskResult(**task) for task in content["tasks"]]})


def summarise(task: str, outcomes: list[bool], seeds: list[int], seconds: float, suite: str = "") -> TaskResult:
    """Count outcomes and put an interval around their rate."""
    successes, episodes = sum(outcomes), len(outcomes)
    interval = wilson_interval(successes, episodes)
    return TaskResult(task, successes, episodes, successes / episodes, interval, seconds, seeds, outcomes, suite)


def _together(name: str, tasks: list[TaskResult]) -> TaskResult:
    outcomes = [outcome for task in tasks for outcome in task.outcomes]
    seeds = [seed for task in tasks for seed in task.seeds]
    return summarise(name, outcomes, seeds, sum(task.seconds for task in tasks))
