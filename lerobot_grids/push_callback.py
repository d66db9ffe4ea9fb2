"""Pushing a policy while it is trained."""

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from .hub import push
from .publishing import Description


class PushCheckpoint(Callback):
    """Push the run's checkpoint every `every_n_steps`, as it was just saved; the last step's is left to the caller.

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
