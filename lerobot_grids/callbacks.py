"""Callbacks of a training run: what it shows, and the files it leaves."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lerobot_policy_grids.checkpoint import CHECKPOINT_FOLDER, atomic_folder

from .averaging import TrainedWeightsAverage
from .checkpoint_io import STATE_FILES, AtomicCheckpointIO

# Metrics on the screen; the logs have all.
SHOWN = ("train/loss", "train/distillation", "val/loss", "val/distillation", "val/chunk_distance")


class RunCheckpoint(Callback):
    """Keep a run: the policy as LeRobot loads it, and the state that training goes on from.

    `<output>/pretrained_model` appears whole or not at all; `<output>/training_state/last.ckpt` is replaced in
    one step, and its predecessor kept. Both are written every `every_n_steps`, at the end, and when the run is told
    to terminate. Where weights are averaged, the policy has the averages.

    Args:
        output: The run's output folder.
        every_n_steps: Optimiser steps between two checkpoints.
    """

    def __init__(self, output: Path, every_n_steps: int = 500) -> None:
        self.folder = Path(output) / CHECKPOINT_FOLDER
        self.state = Path(output) / STATE_FILES[0]
        self.every_n_steps = every_n_steps
        self._saved_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that goes on has this step's state already.
        self._saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        # Micro-batches of one accumulated step share its number.
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning raises this one between two micro-batches; any other may have come in the middle of one.
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        whole_step = done % trainer.accumulate_grad_batches == 0
        if isinstance(exception, SIGTERMException) and whole_step and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == self._saved_at:
            return
        self._saved_at = trainer.global_step
        # Every process takes part: a sharded strategy gathers its state here.
        trainer.save_checkpoint(self.state)
        averages = [callback for callback in trainer.callbacks if isinstance(callback, TrainedWeightsAverage)]
        with averages[0].in_place(pl_module) if averages else nullcontext():
            state = trainer.strategy.lightning_module_state_dict()
            if trainer.is_global_zero:
                policy = {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
                with atomic_folder(self.folder, replace=True) as folder:
                    pl_module.built.save(folder, policy)


class Speed(Callback):
    """Log samples per second over all processes, validation left out, and the peak memory of this one.

    Memory is the device's where there is one, else the process's resident set now.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._seconds = 0.0
        self._samples = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._since == 0.0:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch["task_index"]) * trainer.world_size
        if (batch_idx + 1) % max(1, trainer.log_every_n_steps):
            return
        cuda = pl_module.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        self._pause()
        memory = torch.cuda.max_memory_allocated() if cuda else psutil.Process().memory_info().rss
        pl_module.log("train/samples_per_s", self._samples / self._seconds, batch_size=1)
        pl_module.log("train/memory_mib", memory / 2**20, batch_size=1)
        self._seconds, self._samples, self._since = 0.0, 0, time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._since:
            self._pause()

    def _pause(self) -> None:
        self._seconds += time.perf_counter() - self._since
        self._since = 0.0


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
        self._progress.add_task("", total=int(trainer.estimated_stepping_batches), completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._progress is not None:
            loss = trainer.callback_metrics.get("train/loss")
            text = "" if loss is None else f"loss {float(loss):.3f}"
            self._progress.update(self._progress.task_ids[0], completed=trainer.global_step, description=text)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._progress is not None:
            metrics = trainer.callback_metrics
            text = "  ".join(f"{name} {float(metrics[name]):.4f}" for name in SHOWN if name in metrics)
            self._progress.console.print(f"step {trainer.global_step:>6}  {text}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
