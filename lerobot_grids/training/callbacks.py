"""Callbacks for the token schedule, statistics of coordinates, speed and the progress bar."""

import time
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import Progress

from lerobot_policy_grids.reducers.anchored import AnchoredSampler

from ..console import progress_columns
from ..coordinates import CoordinateStatistics

# Metrics shown on the screen; the logs have all metrics.
SHOWN = ("train/loss", "train/distillation", "val/loss", "val/distillation", "val/chunk_distance")
# Above this share of points, a warning says that the sampler has saturated or collapsed.
TOO_MANY = 0.5


class TokenScheduler(Callback):
    """Set the budget of a grids policy at each step by its schedule, and log it.

    Validation always uses the budget of the final checkpoint.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.policy.config.schedule_steps = int(trainer.estimated_stepping_batches)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        tokens = pl_module.policy.follow_schedule(trainer.global_step)
        pl_module.log("train/num_tokens", float(tokens), batch_size=1)


class CoordinateMonitor(Callback):
    """Log `CoordinateStatistics` at each validation, and warn once if the sampler saturates or collapses."""

    def __init__(self) -> None:
        self._statistics: CoordinateStatistics | None = None
        self._hook: Any = None
        self._warned: set[str] = set()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        reducer = pl_module.policy.reducer
        if isinstance(reducer, AnchoredSampler):
            self._statistics = CoordinateStatistics(reducer.token_grid).to(pl_module.device)
            self._hook = reducer.register_forward_hook(self._statistics.count)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self._statistics is None:
            return
        self._hook.remove()
        values = self._statistics.compute()
        self._statistics = None
        for name, value in values.items():
            pl_module.log(f"coordinates/{name}", value, sync_dist=True)
        if trainer.is_global_zero:
            self._warn(values)

    def _warn(self, values: dict[str, float]) -> None:
        advice = {
            "border": "lie outside the outermost tokens and get no gradient: the sampler has saturated",
            "duplicates": "lie on another one: the sampler has collapsed",
        }
        for name, meaning in advice.items():
            if values[name] > TOO_MANY and name not in self._warned:
                self._warned.add(name)
                Console(stderr=True).print(
                    f"warning: {100 * values[name]:.0f} % of the points {meaning}; "
                    "try a smaller --model.reducer_lr, or a longer warm-up",
                    soft_wrap=True,
                )


class Speed(Callback):
    """Log samples per second of all processes, without validation, and the memory of this process.

    Memory is the peak on the GPU, or without a GPU the current resident memory of the process.
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
    """Show one progress bar for the run, and a line for each validation that stays on the screen."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(stderr=True)
        self._progress: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        """Hide the bar; Lightning calls this in all processes except one."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        columns = progress_columns("training", "steps  {task.description}")
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
