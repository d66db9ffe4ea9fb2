"""lerobot-grids: train, measure and publish LeRobot policies with K visual tokens per camera.

    from lightning import Trainer
    from lerobot_grids import GridsModule, LeRobotDataModule

    data = LeRobotDataModule("me/my_robot_data")
    module = GridsModule(data.meta, policy="tiny", tokens=16)
    Trainer(max_steps=1000, use_distributed_sampler=False).fit(module, data)
    module.loaded.policy  # a lerobot_policy_grids.GridsPolicy

`load` gives a checkpoint with its processors, `evaluate` runs it in simulation. All are imported on use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import LeRobotDataModule
    from .evaluation.rollouts import evaluate
    from .policies import load
    from .training.module import GridsModule

_LAZY = {
    "GridsModule": ".training.module",
    "LeRobotDataModule": ".data",
    "evaluate": ".evaluation.rollouts",
    "load": ".policies",
}

__all__ = ["GridsModule", "LeRobotDataModule", "evaluate", "load"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
