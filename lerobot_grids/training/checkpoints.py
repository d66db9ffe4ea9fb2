"""Callbacks that save a run's checkpoint and training state, and push the checkpoint to the Hub."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lerobot_policy_grids.checkpoint import CHECKPOINT_FOLDER, atomic_folder
from lerobot_policy_grids.checkpoint.files import WEIGHTS_FILE, open_tensors

from ..hub.prepare import Description
from ..hub.push import push
from .averaging import TrainedWeightsAverage
from .finite import require_finite_weights
from .lora import state_with_lora_added
from .state import STATE_FILES, AtomicCheckpointIO


class RunCheckpoint(Callback):
    """Save the policy, in LeRobot's format, and the training state to resume from.

    `<output>/pretrained_model` is written completely or not at all. `<output>/training_state/last.ckpt` is replaced
    atomically, and the previous state is kept. Both are written every `every_n_steps`, at the end, and when the run
    gets a signal to terminate. With averaged weights the saved policy has the averages.

    Args:
        output: The run's output folder.
        every_n_steps: Number of optimiser steps between two checkpoints.

    Attributes:
        saved_at: Optimiser step of the last state that was saved, or resumed from.
    """

    def __init__(self, output: Path, every_n_steps: int = 500) -> None:
        self.folder = Path(output) / CHECKPOINT_FOLDER
        self.state = Path(output) / STATE_FILES[0]
        self.every_n_steps = every_n_steps
        self.saved_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run has already saved the state of this step.
        self.saved_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        # The micro-batches of one accumulated step have the same step number.
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning raises this exception between two micro-batches; others may come in the middle of one.
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        whole_step = done % trainer.accumulate_grad_batches == 0
        if isinstance(exception, SIGTERMException) and whole_step and trainer.global_step > 0:
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step == self.saved_at:
            return
        require_finite_weights(pl_module.named_parameters(), trainer.global_step)
        self.saved_at = trainer.global_step
        # All processes must call this, because a sharded strategy gathers its state here.
        trainer.save_checkpoint(self.state)
        averages = [callback for callback in trainer.callbacks if isinstance(callback, TrainedWeightsAverage)]
        with averages[0].in_place(pl_module) if averages else nullcontext():
            state = trainer.strategy.lightning_module_state_dict()
            if trainer.is_global_zero:
                policy = {k.removeprefix("policy."): v for k, v in state.items() if k.startswith("policy.")}
                with atomic_folder(self.folder, replace=True) as folder:
                    pl_module.loaded.save(folder, state_with_lora_added(pl_module.policy, policy))
                    _read_back(folder / WEIGHTS_FILE)


def _read_back(path: Path) -> None:
    """Raise `CheckpointError` unless every tensor of a weights file can be read, before it replaces the last one."""
    with open_tensors(path, "the last checkpoint is kept; continue with --resume") as file:
        for name in file.keys():  # noqa: SIM118 (no dictionary)
            file.get_tensor(name)


class PushCheckpoint(Callback):
    """Push the run's saved checkpoint every `every_n_steps`; the caller pushes the last one.

    Training waits for the push. Every training step has its own seed, so pushes do not change the trained weights.
    After a failed push a warning is printed and training continues.

    Args:
        output: The run's output folder. `RunCheckpoint` must run before this callback and also save at these steps.
        repo_id: `user/name`.
        every_n_steps: Number of optimiser steps between two pushes.
        dataset: Hub id of the training data, for the card.
    """

    def __init__(self, output: Path, repo_id: str, every_n_steps: int, dataset: str | None = None) -> None:
        self.output, self.repo_id, self.every_n_steps, self.dataset = output, repo_id, every_n_steps, dataset
        self._pushed_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run has already pushed this step.
        self._pushed_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        # The micro-batches of one accumulated step have the same step number.
        if step % self.every_n_steps or step in (0, self._pushed_at, trainer.max_steps):
            return
        self._pushed_at = step
        if trainer.is_global_zero:
            self._push(step)

    def _push(self, step: int) -> None:
        try:
            pushed = push(self.output, self.repo_id, description=Description(dataset=self.dataset, step=step))
        except Exception as error:  # no failure of a push may stop the training
            reason = " ".join(str(error).split()) or type(error).__name__
            print(
                f"warning: step {step} was not pushed to {self.repo_id}: {reason}; training continues, "
                f"the next push is after {self.every_n_steps} steps or at the end",
                file=sys.stderr,
            )
        else:
            done = f"step {step} changed nothing:" if pushed.unchanged else f"pushed step {step} to"
            print(f"{done} {self.repo_id}@{pushed.commit}")
