"""A sampler with ideal coordinates: the simulator puts its four points on hand, object and goal.

python benchmarks/oracle.py fit --policy tiny_metaworld --dataset demonstrations --tokens 4 --output oracle4 ...
python benchmarks/oracle.py eval --policy oracle4 --videos 0 --episodes 50

`python benchmarks/study.py oracle` runs both and saves the results. The commands and options are those of
lerobot-grids. The fourth point lies halfway between hand and object. The camera must be at its default position, so
--perturb camera gives wrong points.
"""

import sys
from typing import Any

import numpy as np
import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from lerobot_grids.data import POSITIONS
from lerobot_grids.simulation.camera import CAMERA_FOVY, CAMERA_POSITION, CAMERA_TARGET, camera_axes
from lerobot_grids.simulation.metaworld import GOAL_POSITION, OBJECT_POSITION, MetaworldEnv
from lerobot_grids.training.module import GridsModule
from lerobot_grids_cli.main import main
from lerobot_policy_grids.reducers.mean_sampler import MeanSampler


def project(points: Tensor) -> Tensor:
    """Project points [..., 3] in metres into the camera's image: (x, y) in [0, 1]."""
    axes = torch.tensor(camera_axes(CAMERA_POSITION, CAMERA_TARGET), dtype=torch.float32)
    left, down, backward = ((points.float() - torch.tensor(CAMERA_POSITION)) @ axes).unbind(-1)
    focal = 0.5 / np.tan(np.radians(CAMERA_FOVY) / 2)
    return 0.5 + focal * torch.stack([left, -down], -1) / backward[..., None]


class Oracle:
    """Positions of hand, object and goal for the next training batch, or from the running environments."""

    def __init__(self) -> None:
        self.points: Tensor | None = None
        self.environments: list[MetaworldEnv] = []
        self.task = ""

    def tell(self, hand: Tensor, thing: Tensor, goal: Tensor) -> None:
        """Store positions [b, 3] in metres as points in the image."""
        hand, thing, goal = project(hand), project(thing), project(goal)
        self.points = torch.stack([hand, thing, goal, (hand + thing) / 2], 1).clamp(0, 1)

    def look(self, count: int) -> None:
        """Read the positions from the simulators of the current task."""
        running = [env for env in self.environments if env.task == self.task][-count:]
        raw = torch.tensor(np.stack([env.raw_observation for env in running]))
        self.tell(raw[:, :3], raw[:, OBJECT_POSITION], raw[:, GOAL_POSITION])


def install(oracle: Oracle) -> None:
    """Replace the predicted coordinates of all samplers in this process by the oracle's points."""
    prepare, make, observe = GridsModule._prepare, MetaworldEnv.__init__, MetaworldEnv._format_raw_obs

    def prepare_told(self: GridsModule, batch: dict[str, Any], augment: bool) -> dict[str, Any]:
        positions, state = batch[POSITIONS], batch[OBS_STATE].flatten(1)
        oracle.tell(state[:, :3], positions[:, :3], positions[:, 3:6])
        return prepare(self, batch, augment)

    def make_known(self: MetaworldEnv, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        oracle.environments.append(self)

    def observe_known(self: MetaworldEnv, raw_obs: np.ndarray) -> dict[str, Any]:
        oracle.task = self.task
        return observe(self, raw_obs)

    def predict(self: MeanSampler, feature_map: Tensor, context: Any, k: int, region: Any) -> tuple[Tensor, Tensor]:
        if oracle.environments:
            oracle.look(len(feature_map))
        assert oracle.points is not None, "the oracle knows MetaWorld's positions only"
        assert k <= 4, "the oracle knows four places"
        points = oracle.points[:, :k].to(feature_map.device)
        return points * self.grid_size - 0.5, points

    GridsModule._prepare = prepare_told  # type: ignore[method-assign]
    MetaworldEnv.__init__ = make_known  # type: ignore[method-assign]
    MetaworldEnv._format_raw_obs = observe_known  # type: ignore[method-assign]
    MeanSampler._predict = predict  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Oracle())
    sys.exit(main(sys.argv[1:]))
