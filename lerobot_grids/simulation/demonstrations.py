"""What a scripted expert shows: the contract between a simulator's expert and `recording`."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Demonstration:
    """One successful episode.

    Attributes:
        instruction: What the robot is told.
        columns: Feature name -> values of every step, [t, ...].
    """

    instruction: str
    columns: dict[str, np.ndarray]

    @property
    def length(self) -> int:
        """Number of steps."""
        return len(next(iter(self.columns.values())))


class Demonstrator(Protocol):
    """A simulator with a scripted expert. It is sent to worker processes, so it holds options and no simulator."""

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks to be recorded."""

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Features of the dataset, as LeRobot describes them."""

    @property
    def fps(self) -> int:
        """Steps per second."""

    @property
    def robot_type(self) -> str:
        """LeRobot's name of the robot."""

    def demonstrate(self, task: str, seed: int) -> Demonstration | None:
        """One episode of a task, or None if the expert fails.

        Noise is added to the executed actions, so that recoveries are recorded too. The recorded actions are the
        expert's own. A process may keep the simulator of the task for the next call.
        """


def image_feature(size: int) -> dict[str, Any]:
    """The feature of a square camera image of `size` pixels."""
    return {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channels"]}


def vector_feature(names: list[str]) -> dict[str, Any]:
    """The feature of a vector with a name for each entry."""
    return {"dtype": "float32", "shape": (len(names),), "names": names}
