"""How well a controller does that is told where object and goal are: what sight can be worth, and how exact it must be.

    python benchmarks/libero/told.py outputs/libero/object --off 0 1    # 12 minutes, one core

A perceptron of state, task and true places learns the demonstrations' actions without an image. It then acts on dealt
layouts and is told places that are off by `--off` centimetres (standard deviation along x and y, the same in all steps
of an episode). It does not know how objects are turned.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from descent import descend
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, OBS_STATE
from recorded import HELD_OUT
from torch import Tensor, nn
from torch.nn import functional

from lerobot_grids.data import load_metadata
from lerobot_grids.data.metadata import POSITIONS
from lerobot_grids.simulation.libero.demonstrator import as_policies_see
from lerobot_grids.simulation.libero.environment import LiberoConfig
from lerobot_grids.simulation.libero.expert import Expert
from lerobot_policy_grids.families.distances import mean_where

CHUNK, EXECUTED, STEPS = 16, 4, 280
FIRST_SEED = 100_000
WIDTH, RATE, BATCH = 256, 2e-3, 256
# Distances in metres between which the controller has to tell differences.
SCALES = (0.01, 0.03, 0.1)


class Controller(nn.Module):
    """Tells the next actions from the robot's state, the places of object and goal, and the task."""

    def __init__(self, states: Tensor, tasks: list[str], actions: int) -> None:
        super().__init__()
        self.mean, self.std, self.tasks = states.mean(0), states.std(0).clamp_min(1e-3), tasks
        inputs = states.shape[1] + 3 * (3 + len(SCALES)) + len(tasks)
        layers: list[nn.Module] = []
        for width in (inputs, WIDTH, WIDTH):
            layers += [nn.Linear(width, WIDTH), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, CHUNK * actions))

    def forward(self, states: Tensor, places: Tensor, tasks: Tensor) -> Tensor:
        """Actions [b, chunk, d] from states [b, n], places [b, 6] in metres and numbers of tasks [b]."""
        to_object, to_goal = places[:, :3] - states[:, :3], places[:, 3:] - states[:, :3]
        ways = [to_object / 0.2, to_goal / 0.2, (places[:, :3] - places[:, 3:]) / 0.2]
        ways += [(to_object / scale).tanh() for scale in SCALES]
        named = functional.one_hot(tasks, len(self.tasks)).float()
        told = self.layers(torch.cat([(states - self.mean) / self.std, *ways, named], 1))
        return told.unflatten(-1, (CHUNK, -1))


def train(dataset: str, steps: int) -> tuple[Controller, int]:
    """(a controller that learned the demonstrations of a dataset, their number)."""
    meta = load_metadata(dataset)
    rows = LeRobotDataset(meta.repo_id, root=meta.root).hf_dataset.with_format("numpy")
    states, actions, places, episodes, tasks = (
        torch.from_numpy(np.stack(rows[name])) for name in (OBS_STATE, ACTION, POSITIONS, "episode_index", "task_index")
    )
    names = [str(name) for name in meta.tasks.sort_values("task_index").index]
    ends = torch.zeros(len(episodes), dtype=torch.long)
    ends[:-1], ends[-1] = episodes[1:] != episodes[:-1], 1
    last = torch.where(ends)[0][torch.searchsorted(torch.where(ends)[0], torch.arange(len(episodes)))]
    following = torch.arange(len(episodes))[:, None] + torch.arange(CHUNK)
    over, chunks = following > last[:, None], actions[torch.minimum(following, last[:, None])]
    controller = Controller(states, names, actions.shape[1])
    shown = torch.where(episodes % HELD_OUT != HELD_OUT - 1)[0]

    def compute_loss() -> Tensor:
        index = shown[torch.randint(len(shown), (BATCH,))]
        error = (controller(states[index], places[index], tasks[index]) - chunks[index]).abs().mean(-1)
        return mean_where(error, ~over[index])

    for step, loss in descend(controller, compute_loss, steps=steps, rate=RATE):
        if step % 1000 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    return controller, len(episodes[shown].unique())


@torch.no_grad()
def act(controller: Controller, task: str, episodes: int, off: float) -> str:
    """The outcome of each episode of a task, 1 for success."""
    config = LiberoConfig(task=task, layout="dealt", drawing="fast", observation_height=32, observation_width=32)
    prepare = config.get_env_processors()[0]
    ((suite, (number,)),) = config.chosen.items()
    env, outcomes = config.make(suite, number), ""
    for seed in range(FIRST_SEED, FIRST_SEED + episodes):
        observation, _ = env.reset(seed=seed)
        expert, wrong = Expert(env.simulation), np.zeros(6)
        wrong[:2] = np.random.default_rng(seed).normal(0, off / 100, 2)
        ready: list[np.ndarray] = []
        info: dict[str, Any] = {"is_success": False}
        for _ in range(STEPS):
            if not ready:
                state = as_policies_see(observation, prepare)[OBS_STATE].float()
                places = np.concatenate([expert.object_position(), expert.target_position()]) + wrong
                numbers = torch.tensor([controller.tasks.index(env.task_description)])
                told = controller(state, torch.from_numpy(places).float()[None], numbers)[0]
                ready = list(told[:EXECUTED].clamp(-1, 1).numpy())
            observation, _, _, _, info = env.step(ready.pop(0))
            if info["is_success"]:
                break
        outcomes += str(int(info["is_success"]))
    env.close()
    return outcomes


def main() -> None:
    """Train, act, say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="recorded demonstrations")
    parser.add_argument("--tasks", default="libero_object", help="a suite, or tasks of one, comma-separated")
    parser.add_argument("--episodes", type=int, default=3, help="of each task")
    parser.add_argument("--off", type=float, nargs="+", default=[0.0, 1.0], help="centimetres by which places are off")
    parser.add_argument("--steps", type=int, default=6000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    begin = time.perf_counter()
    controller, demonstrations = train(arguments.dataset, arguments.steps)
    for off in arguments.off:
        names = LiberoConfig(task=arguments.tasks).names
        outcomes = {name: act(controller, name, arguments.episodes, off) for name in names}
        said = {
            "kind": "libero-told",
            "name": f"{off:g} cm off",
            "centimetres_off": off,
            "demonstrations": demonstrations,
            "outcomes": outcomes,
        }
        print(json.dumps(said | {"seconds": round(time.perf_counter() - begin)}), flush=True)


if __name__ == "__main__":
    main()
