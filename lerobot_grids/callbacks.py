"""Callbacks that turn a training run into files people use."""

from pathlib import Path
from typing import Any

from lerobot_policy_grids.checkpoint import CHECKPOINT_FOLDER, atomic_folder
from lightning.pytorch import Callback, LightningModule, Trainer


class CheckpointExport(Callback):
    """Write the policy as a LeRobot checkpoint folder, `<output>/pretrained_model`, whole or not at all.

    Args:
        output: The run's output folder.
        every_n_steps: Also write it every this many steps, so that a killed run leaves a policy.
    """

    def __init__(self, output: Path, every_n_steps: int = 500) -> None:
        self.folder = Path(output) / CHECKPOINT_FOLDER
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step < trainer.max_steps:
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            with atomic_folder(self.folder, replace=True) as folder:
                pl_module.built.save(folder)
