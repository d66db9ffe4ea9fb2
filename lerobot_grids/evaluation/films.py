"""Films of episodes with the points at which a policy looked."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.scripts.lerobot_eval import rollout
from lerobot.utils.io_utils import write_video

from lerobot_policy_grids.modeling_grids import GridsPolicy

from ..view import contact_sheet, draw_points, watch_coordinates
from .loading import LoadedPolicy
from .rollouts import Task, acting, open_tasks, without_bars


def film(
    loaded: LoadedPolicy,
    env_config: EnvConfig,
    folder: Path,
    *,
    episodes: int,
    seed: int = 100_000,
    frames: int = 6,
    tampering: list[str] | None = None,
) -> list[Path]:
    """Film a few episodes of every task with the sampled points drawn on the frames.

    Args:
        loaded: Policy and processors.
        env_config: LeRobot's configuration of the environment; its images should be rendered at every step.
        folder: Where `<task>_<seed>.mp4` and `looks.png`, a sheet of `frames` frames per episode, are written.
        episodes: Episodes of each task.
        seed: Seed of the first episode.
        frames: Frames of each episode on the sheet.
        tampering: As in `evaluate`. Films show the camera's image, not what was made of it.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    rows: list[list[np.ndarray]] = []
    with open_tasks(env_config, 1, tampering or []) as tasks:
        for task in tasks:
            with acting(loaded, env_config, task, tampering or [], seed) as arguments:
                for episode in range(episodes):
                    task.begin_at(episode)
                    images = _film_episode(loaded.policy, task, arguments, seed + episode)
                    path = folder / f"{task.name}_{seed + episode}.mp4"
                    write_video(str(path), np.stack(images), task.env.metadata.get("render_fps", 30))
                    written.append(path)
                    # The first frame is drawn before the policy has looked at it.
                    picked = np.linspace(min(1, len(images) - 1), len(images) - 1, frames).round().astype(int)
                    rows.append([images[i] for i in picked])
            task.close()
    sheet = folder / "looks.png"
    contact_sheet(rows, sheet)
    return [*written, sheet]


def _film_episode(policy: Any, task: Task, arguments: dict[str, Any], seed: int) -> list[np.ndarray]:
    """Run one episode and return its frames with the policy's points, uint8 [h, w, 3] each."""
    torch.manual_seed(seed)
    images: list[np.ndarray] = []
    with watch_coordinates(policy) as looks:

        def draw(env: Any) -> None:
            frame = np.ascontiguousarray(env.envs[0].render())
            # Elsewhere what is rendered for people is not what the policy sees.
            seen = looks and getattr(env.envs[0].unwrapped, "renders_observation", False)
            points = looks[-1][0].numpy() if seen else np.zeros((0, 2))
            region = _image_region(policy, *frame.shape[:2])
            images.append(draw_points(frame, points, region, f"{task.name}  {len(images)}"))

        with without_bars():
            rollout(task.env, **arguments, seeds=[seed], render_callback=draw)
    if len(images) <= task.env.call("_max_episode_steps")[0]:
        images.pop()  # success resets the simulator, so the last frame shows another episode
    return images


def _image_region(policy: Any, height: int, width: int) -> tuple[float, float, float, float]:
    if isinstance(policy, GridsPolicy):
        return policy.adapter.image_region(policy.base, height, width)
    return 0.0, 0.0, 1.0, 1.0
