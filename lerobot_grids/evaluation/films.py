"""Films of episodes that show the points at which a policy sampled the image."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.envs.configs import EnvConfig
from lerobot.scripts.lerobot_eval import rollout
from lerobot.utils.io_utils import write_video
from PIL import Image
from torch import Tensor

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.looks import Points, points_of
from lerobot_policy_grids.reducers.anchors import WHOLE

from ..looks.drawing import draw as draw_on
from ..looks.sheets import Line, Row, sheet
from ..policies import LoadedPolicy
from .rollouts import Task, acting, open_tasks, without_bars

# Longer side of a picture in pixels.
SIDE = 384
NO_POINTS = Points(np.zeros((0, 2)), None, WHOLE)


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
    """Film a few episodes of every task, with the sampled points drawn on the frames.

    Args:
        loaded: The policy and its processors.
        env_config: LeRobot's configuration of the environment; its images should be rendered at every step.
        folder: Output folder for `<task>_<seed>.mp4` and `looks.png`, a sheet with `frames` frames per episode.
        episodes: Number of episodes of each task.
        seed: Seed of the first episode.
        frames: Number of frames of each episode on the sheet.
        tampering: As in `evaluate`. Films show the original camera image, without the tampering.

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
                    # The first frame is drawn before the policy has seen it, so it has no points.
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
            # In other environments `render` gives another image than the policy's.
            if looks and getattr(env.envs[0].unwrapped, "renders_observation", False):
                points = points_of(policy, 0, looks[-1][0].numpy(), frame.shape[:2])
            else:
                points = NO_POINTS
            picture = draw_on(frame, points, side=SIDE)
            images.append(sheet([Line(f"{task.name}  {len(images)}")], [""], [Row("", [picture])]))

        with without_bars():
            rollout(task.env, **arguments, seeds=[seed], render_callback=draw)
    if len(images) <= task.env.call("_max_episode_steps")[0]:
        images.pop()  # success resets the simulator, so the last frame shows another episode
    return images


@contextmanager
def watch_coordinates(policy: Any) -> Iterator[list[Tensor]]:
    """Collect the sampled coordinates of each forward pass while the block runs.

    Yields:
        A list that gets one float32 [cameras * b, k, 2] per forward pass. It stays empty for a dense policy.
    """
    seen: list[Tensor] = []
    if not isinstance(policy, GridsPolicy):
        yield seen
        return
    handle = policy.reducer.register_forward_hook(
        lambda module, inputs, output: seen.append(output.coordinates.detach().cpu())
    )
    try:
        yield seen
    finally:
        handle.remove()


def contact_sheet(rows: list[list[np.ndarray]], path: Path) -> None:
    """Save rows of equally large images as one PNG; shorter rows are filled with black."""
    columns = max(len(row) for row in rows)
    blank = np.zeros_like(rows[0][0])
    lines = [np.concatenate(row + [blank] * (columns - len(row)), axis=1) for row in rows]
    Image.fromarray(np.concatenate(lines, axis=0)).save(path)
