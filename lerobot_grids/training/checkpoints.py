"""Callbacks that keep a run: its checkpoint and its training state, and pushes of the checkpoint to the Hub."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lerobot_policy_grids.checkpoint import CHECKPOINT_FOLDER, atomic_folder

from ..hub.prepare import Description
from ..hub.push import push
from .averaging import TrainedWeightsAverage
from .lora import state_with_lora_added
from .state import STATE_FILES, AtomicCheckpointIO


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
                    pl_module.loaded.save(folder, state_with_lora_added(pl_module.policy, policy))


class PushCheckpoint(Callback):
    """Push the run's checkpoint every `every_n_steps`, as it was just saved; the caller pushes the last step's.

    Training waits for the push. Every training step draws from its own seed, so the weights are the same bits as
    without it. A push that fails costs a line on stderr; training goes on.

    Args:
        output: The run's output folder. `RunCheckpoint` comes before this callback and saves at these steps too.
        repo_id: `user/name`.
        every_n_steps: Optimiser steps between two pushes.
        dataset: Hub id of the training data, for the card.
    """

    def __init__(self, output: Path, repo_id: str, every_n_steps: int, dataset: str | None = None) -> None:
        self.output, self.repo_id, self.every_n_steps, self.dataset = output, repo_id, every_n_steps, dataset
        self._pushed_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that goes on from this step came by here already.
        self._pushed_at = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        # Micro-batches of one accumulated step share its number.
        if step % self.every_n_steps or step in (0, self._pushed_at, trainer.max_steps):
            return
        self._pushed_at = step
        if trainer.is_global_zero:
            self._push(step)

    def _push(self, step: int) -> None:
        try:
            pushed = push(self.output, self.repo_id, description=Description(dataset=self.dataset, step=step))
        except Exception as error:  # whatever it is, the training is worth more
            reason = " ".join(str(error).split()) or type(error).__name__
            print(
                f"warning: step {step} was not pushed to {self.repo_id}: {reason}; training goes on, "
                f"the next push is {self.every_n_steps} steps from here or at the end",
                file=sys.stderr,
            )
        else:
            print(f"pushed step {step} to {self.repo_id}@{pushed.commit}")
