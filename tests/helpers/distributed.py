"""Train a few steps on one or two processes, with draws that depend on the frames and not on who holds them.

    python distributed.py DATASET POLICY RESULT.pt PROCESSES STRATEGY

Run as a script, because Lightning starts the second process by running it again.
"""

import sys

import lightning
import torch
from lightning.pytorch import Callback

from lerobot_grids.data import LeRobotDataModule
from lerobot_grids.training.module import GridsModule

GLOBAL_BATCH, STEPS = 8, 3


class FixedDraws(Callback):
    """Noise and time from each frame's number; every step of every chunk counts, so that means over shards agree."""

    def __init__(self) -> None:
        self.index: list[int] = []

    def setup(self, trainer, pl_module, stage):
        for policy in (pl_module.policy.base, pl_module.distillation.teacher.policy):
            policy.model.sample_noise, policy.model.sample_time = self.noise, self.time

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch["action_is_pad"].zero_()
        self.index = batch["index"].tolist()

    def noise(self, shape, device):
        return torch.stack([torch.randn(shape[1:], generator=torch.Generator().manual_seed(i)) for i in self.index])

    def time(self, size, device):
        return torch.tensor([(i * 0.37) % 0.9 + 0.05 for i in self.index])


class KeepGradients(Callback):
    """Gradients of the first step, as the optimiser gets them."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.gradients:
            named = pl_module.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def main(dataset: str, policy: str, result: str, processes: int, strategy: str) -> None:
    """Train, and save gradients of the first step and the final weights."""
    torch.set_num_threads(1)
    lightning.seed_everything(0, verbose=False)
    data = LeRobotDataModule(dataset, batch_size=GLOBAL_BATCH // processes, val_fraction=0)
    module = GridsModule(
        data.meta, policy=policy, tokens=4, schedule="elastic:4,9", distill=0.5, jitter=0, state_noise=0, warmup_steps=1
    )
    keep = KeepGradients()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        use_distributed_sampler=False,
        max_steps=STEPS,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FixedDraws(), keep],
    )
    trainer.fit(module, data)
    weights = trainer.strategy.lightning_module_state_dict()
    if trainer.is_global_zero:
        torch.save({"gradients": keep.gradients, "weights": weights}, result)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), sys.argv[5])
