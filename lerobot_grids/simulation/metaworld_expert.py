"""Demonstrations of MetaWorld's scripted experts."""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

from ..data import POSITIONS
from .demonstrations import Demonstration, image_feature, vector_feature
from .disturbance import Disturbance
from .metaworld import MetaworldEnv, expand_tasks


@dataclass(frozen=True)
class MetaworldDemonstrator:
    """Records MetaWorld tasks from the side camera.

    Args:
        names: Tasks, comma-separated.
        size: Height and width of the image in pixels.
        noise: Standard deviation of the Gaussian noise on the executed x, y and z.
    """

    names: str
    size: int = 96
    noise: float = 0.2
    fps: int = 80
    robot_type: str = "sawyer"

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return expand_tasks(self.names)

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """One camera, and the positions of object and goal for auxiliary losses."""
        return {
            OBS_IMAGE: image_feature(self.size),
            OBS_STATE: vector_feature(["x", "y", "z", "gripper"]),
            ACTION: vector_feature(["dx", "dy", "dz", "grip"]),
            POSITIONS: vector_feature([f"{thing}_{axis}" for thing in ("object", "goal") for axis in "xyz"]),
        }

    def demonstrate(self, task: str, seed: int) -> Demonstration | None:
        """One episode, or None if the expert fails; see `Demonstrator`."""
        # The experts warn about every clipped action, and their environments clip by design.
        warnings.filterwarnings("ignore", "Constant", UserWarning)
        env = _environment(task, self.size)
        rows = demonstrate(env, seed, self.noise)
        if rows is None:
            return None
        columns = (np.stack(column) for column in zip(*rows, strict=True))
        return Demonstration(env.task_description, dict(zip(self.features, columns, strict=True)))


def demonstrate(env: MetaworldEnv, seed: int, noise: float) -> list[tuple[np.ndarray, ...]] | None:
    """(image, state, action, positions) of each step of an episode of the expert, or None if it fails."""
    disturb = Disturbance(np.random.default_rng(seed), noise)
    observation, _ = env.reset(seed=seed)
    rows: list[tuple[np.ndarray, ...]] = []
    for _ in range(env._max_episode_steps):
        expert = np.clip(env.expert_policy.get_action(env.raw_observation), -1, 1).astype(np.float32)
        rows.append((observation["pixels"], observation["agent_pos"].astype(np.float32), expert, env.positions))
        observation, _, terminated, truncated, info = env.step(disturb(expert))
        if terminated and info["is_success"]:
            return rows
        if terminated or truncated:
            return None
    return None


@functools.cache
def _environment(task: str, size: int) -> MetaworldEnv:
    return MetaworldEnv(task, size)
