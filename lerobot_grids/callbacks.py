"""Callbacks of a training run: what it shows, and the files it leaves."""

from pathlib import Path
from typing import Any

from lerobot_policy_grids.checkpoint import CHECKPOINT_FOLDER, atomic_folder
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
        # Micro-batches of one accumulated step share its number; the last of them made the step.
        stepped = trainer.fit_loop.epoch_loop._should_accumulate() is False
        if stepped and trainer.global_step % self.every_n_steps == 0 and trainer.global_step < trainer.max_steps:
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            with atomic_folder(self.folder, replace=True) as folder:
                pl_module.built.save(folder)


class TrainingProgress(ProgressBar):
    """One bar over all steps of the run, and a line per validation that stays on the screen."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(stderr=True)
        self._progress: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all but one process."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  {task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console)
        self._progress.add_task("", total=trainer.max_steps, completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._progress is not None:
            loss = trainer.callback_metrics.get("train/loss")
            text = "" if loss is None else f"loss {float(loss):.3f}"
            self._progress.update(self._progress.task_ids[0], completed=trainer.global_step, description=text)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is not None:
            metrics = trainer.callback_metrics
            shown = {name: float(metrics[name]) for name in metrics if name.startswith(("train/", "val/"))}
            text = "  ".join(f"{name} {value:.4f}" for name, value in sorted(shown.items()))
            self._progress.console.print(f"step {trainer.global_step:>6}  {text}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
