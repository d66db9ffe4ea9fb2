"""Record demonstrations of MetaWorld's scripted experts as a LeRobotDataset."""

import functools
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_policy_grids.checkpoint.atomic import atomic_folder
from lerobot_policy_grids.errors import SimulationError

from ..data import POSITIONS
from .metaworld import MetaworldEnv, expand_tasks

IMAGE, STATE, ACTION = "observation.image", "observation.state", "action"


@dataclass(frozen=True)
class Demonstration:
    """One successful episode: images uint8 [t, s, s, 3], states [t, 4], positions [t, 6], actions [t, 4]."""

    task: str
    images: np.ndarray
    states: np.ndarray
    positions: np.ndarray
    actions: np.ndarray


def demonstrate(env: MetaworldEnv, seed: int, noise: float) -> Demonstration | None:
    """Run one episode with the scripted expert.

    Noise is added to the executed action, so that the recording also shows recoveries. The recorded action is the
    expert's own, without noise.

    Args:
        env: The environment.
        seed: Seed of the initial state and of the noise.
        noise: Standard deviation of the Gaussian noise on the executed x, y and z.

    Returns:
        The episode, or None if it did not succeed.
    """
    random = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    frames: list[tuple[np.ndarray, ...]] = []
    for _ in range(env._max_episode_steps):
        expert = np.clip(env.expert_policy.get_action(env.raw_observation), -1, 1).astype(np.float32)
        state = observation["agent_pos"].astype(np.float32)
        frames.append((observation["pixels"], state, env.positions, expert))
        executed = expert.copy()
        executed[:3] += random.normal(0, noise, 3)
        observation, _, terminated, truncated, info = env.step(np.clip(executed, -1, 1))
        if terminated and info["is_success"]:
            images, states, positions, actions = (np.stack(column) for column in zip(*frames, strict=True))
            return Demonstration(env.task_description, images, states, positions, actions)
        if terminated or truncated:
            return None
    return None


def demonstrations(
    tasks: list[str], episodes: int, size: int, noise: float, seed: int, workers: int
) -> Iterator[Demonstration]:
    """Yield `episodes` successful episodes of each task; a failed one is repeated with the next seed.

    The result does not depend on `workers`, because seeds are used in order.

    Raises:
        SimulationError: If the expert fails more than three times as often as it succeeds.
    """
    # spawn: a forked process would inherit an OpenGL context that it cannot use.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for task in tasks:
            successes = tries = 0
            pending: deque[Future[Demonstration | None]] = deque()
            while successes < episodes:
                if tries >= 20 + 4 * episodes:
                    raise SimulationError(
                        f"the expert succeeded in {successes} of {tries} episodes of {task}; "
                        "lower --noise, or leave the task out"
                    )
                while len(pending) < min(workers + 1, episodes - successes):
                    pending.append(pool.submit(_demonstrate_in_worker, task, size, seed + tries + len(pending), noise))
                episode = pending.popleft().result()
                tries += 1
                if episode is not None:
                    successes += 1
                    yield episode


@functools.cache
def _worker_env(task: str, size: int) -> MetaworldEnv:
    return MetaworldEnv(task, size)


def _demonstrate_in_worker(task: str, size: int, seed: int, noise: float) -> Demonstration | None:
    # The experts warn about every clipped action, and their environments clip by design.
    warnings.filterwarnings("ignore", "Constant", UserWarning)
    return demonstrate(_worker_env(task, size), seed, noise)


def record(
    output: str | Path,
    *,
    tasks: str,
    episodes: int,
    size: int = 96,
    noise: float = 0.2,
    seed: int = 5000,
    workers: int = 2,
    on_episode: Callable[[Demonstration], None] | None = None,
) -> dict[str, int]:
    """Record demonstrations into a new LeRobotDataset (format v3.0).

    The folder appears only when it is complete; an interrupted recording leaves nothing behind.

    Args:
        output: Folder of the new dataset.
        tasks: MetaWorld tasks, comma-separated.
        episodes: Number of successful episodes of each task.
        size: Height and width of the images in pixels.
        noise: Standard deviation of the noise on executed actions.
        seed: First seed; evaluations should use other seeds.
        workers: Number of processes that simulate.
        on_episode: Called with each `Demonstration`, for a progress bar.

    Returns:
        {"episodes": number, "frames": number}.

    Raises:
        OutputExistsError: If `output` exists.
        SimulationError: If a task or a renderer is missing, or the expert keeps failing.
    """
    names = expand_tasks(tasks)
    features = {
        IMAGE: {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channels"]},
        STATE: {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
        ACTION: {"dtype": "float32", "shape": (4,), "names": ["dx", "dy", "dz", "grip"]},
        POSITIONS: {
            "dtype": "float32",
            "shape": (6,),
            "names": [f"{thing}_{axis}" for thing in ("object", "goal") for axis in "xyz"],
        },
    }
    count = {"episodes": 0, "frames": 0}
    datasets.disable_progress_bars()  # one per episode would overwrite the caller's bar
    output = Path(output)
    with atomic_folder(output) as folder:
        folder.rmdir()  # LeRobot must create it
        dataset = LeRobotDataset.create(
            repo_id=f"local/{output.name}",
            fps=80,
            features=features,
            root=folder,
            robot_type="sawyer",
            use_videos=False,
        )
        try:
            for episode in demonstrations(names, episodes, size, noise, seed, workers):
                columns = (episode.images, episode.states, episode.actions, episode.positions)
                for image, state, action, positions in zip(*columns, strict=True):
                    frame = {IMAGE: image, STATE: state, ACTION: action, POSITIONS: positions, "task": episode.task}
                    dataset.add_frame(frame)
                dataset.save_episode()
                count["episodes"] += 1
                count["frames"] += len(episode.images)
                if on_episode is not None:
                    on_episode(episode)
        finally:
            # Needed after an interruption too: otherwise LeRobot writes the folder again after it was removed.
            dataset.finalize()
        # The images are in the parquet files now; LeRobot does not remove its temporary folders.
        shutil.rmtree(folder / "images", ignore_errors=True)
    return count
