"""Demonstrations of the scripted expert in LIBERO, with the names and the orientation of LeRobot's environment."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.envs.utils import preprocess_observation
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from ...data import PLACES, POSITIONS
from ..demonstrations import Demonstration, image_feature, vector_feature
from ..disturbance import Disturbance
from .environment import LiberoConfig, LiberoEnv
from .expert import Expert

CAMERAS = {f"{OBS_IMAGES}.image": "agentview_image", f"{OBS_IMAGES}.image2": "robot0_eye_in_hand_image"}
THINGS = ("object", "goal")
# How far waypoints of different demonstrations lie apart, in metres.
WAYPOINT_NOISE = 0.008


@dataclass(frozen=True)
class LiberoDemonstrator:
    """Records LIBERO's pick-and-place tasks from both cameras.

    Args:
        names: Suites or tasks, comma-separated.
        layout: "official" or "dealt".
        size: Height and width of the images in pixels.
        noise: Standard deviation of the Gaussian noise on the executed x, y and z.
        zoom: How many times larger the overview camera draws.
        pushes: Share of the steps in which a push begins (`Disturbance`).
    """

    names: str
    layout: str = "dealt"
    size: int = 96
    noise: float = 0.15
    zoom: float = 1.0
    pushes: float = 0.04
    fps: int = 20
    robot_type: str = "panda"

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, such as libero_object_3."""
        return self._config(self.names).names

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """Two cameras, and where object and goal are: in the world, and in each image."""
        places = [f"{camera}_{thing}_{axis}" for camera in ("image", "image2") for thing in THINGS for axis in "xy"]
        return {
            **dict.fromkeys(CAMERAS, image_feature(self.size)),
            OBS_STATE: vector_feature(["x", "y", "z", "rx", "ry", "rz", "finger1", "finger2"]),
            ACTION: vector_feature(["dx", "dy", "dz", "drx", "dry", "drz", "grip"]),
            POSITIONS: vector_feature([f"{thing}_{axis}" for thing in THINGS for axis in "xyz"]),
            PLACES: vector_feature(places),
        }

    def demonstrate(self, task: str, seed: int) -> Demonstration | None:
        """One episode, or None if the expert fails; see `Demonstrator`."""
        env, prepare = _environment(self, task)
        # Official states are used in turn.
        env.init_state_id = seed
        observation, _ = env.reset(seed=seed)
        observation = self.lead_in(env, prepare, observation, seed)
        expert = Expert(env.simulation, WAYPOINT_NOISE, seed)
        disturb = Disturbance(np.random.default_rng(seed), self.noise, self.pushes)
        rows: list[tuple[np.ndarray, ...]] = []
        for _ in range(env._max_episode_steps):
            action = np.clip(expert.act(), -1, 1)
            where = (expert.object_position(), expert.target_position())
            places = [env.image_place(camera, point) for camera in CAMERAS.values() for point in where]
            seen = as_policies_see(observation, prepare)
            images = [(seen[name][0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy() for name in CAMERAS]
            state = seen[OBS_STATE][0].numpy()
            rows.append((*images, state, action, np.concatenate(where).astype(np.float32), np.concatenate(places)))
            observation, _, _, _, info = env.step(disturb(action))
            if info["is_success"]:
                columns = (np.stack(column) for column in zip(*rows, strict=True))
                return Demonstration(env.task_description, dict(zip(self.features, columns, strict=True)))
        return None

    def lead_in(self, env: LiberoEnv, prepare: Any, observation: dict[str, Any], seed: int) -> dict[str, Any]:
        """What happens before the expert begins, and is not recorded: here nothing.

        Args:
            env: The environment, reset.
            prepare: LeRobot's processor of its observations.
            observation: What the environment gave.
            seed: Of the episode.

        Returns:
            What the environment gives afterwards.
        """
        return observation

    def _config(self, names: str) -> LiberoConfig:
        return LiberoConfig(
            task=names,
            layout=self.layout,
            drawing="fast",
            zoom=self.zoom,
            observation_height=self.size,
            observation_width=self.size,
        )


# The environment of the last task in this process; a scene takes a gigabyte.
_open: dict[tuple[LiberoDemonstrator, str], tuple[LiberoEnv, Any]] = {}


def _environment(demonstrator: LiberoDemonstrator, task: str) -> tuple[LiberoEnv, Any]:
    """The environment of a task, and LeRobot's processor of its observations."""
    if (demonstrator, task) not in _open:
        while _open:
            _open.popitem()[1][0].close()
        config = demonstrator._config(task)
        ((suite, (number,)),) = config.chosen.items()
        _open[demonstrator, task] = config.make(suite, number), config.get_env_processors()[0]
    return _open[demonstrator, task]


def as_policies_see(observation: dict[str, Any], prepare: Any) -> dict[str, torch.Tensor]:
    """An observation of one environment in LeRobot's names, as a batch of one.

    Args:
        observation: What the environment gave.
        prepare: LeRobot's processor of its observations.
    """
    seen: dict[str, torch.Tensor] = prepare(preprocess_observation(_batch_of_one(observation)))
    return seen


def _batch_of_one(observation: Any) -> Any:
    if isinstance(observation, dict):
        return {name: _batch_of_one(value) for name, value in observation.items()}
    return observation[None]
