"""TokenBudgetScheduler: the token budget of each training step."""

from typing import Any

from lightning.pytorch import Callback, Trainer


class TokenBudgetScheduler(Callback):
    """Set the budget that a grids policy's configuration has for each step, and log it as a curve.

    Validation always uses the budget that the checkpoint will have.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.policy.config.token_budget_steps = int(trainer.estimated_stepping_batches)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        tokens = pl_module.policy.follow_budget(trainer.global_step)
        pl_module.log("train/num_tokens", float(tokens), batch_size=1)
