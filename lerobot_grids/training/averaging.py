"""Exponential moving average of the trained weights.

Lightning's own callback averages the whole module: it stores frozen weights twice, keeps the copy on the CPU if
training moves to another device, and rounds it at every step. This one stores only trained weights, on their device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lerobot_policy_grids.errors import GridsError


class TrainedWeightsAverage(Callback):
    """Average the trained weights after each optimiser step; validation and saved policies use the average.

    Training continues with the weights themselves.

    Args:
        decay: Weight of the old average at each step.

    Raises:
        GridsError: If the decay is not from 0 to below 1.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise GridsError(
                f"--ema {decay}; give the share of the old average at each step, from 0 to below 1, such as 0.999"
            )
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._updated_at = 0
        self._in_place = False

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy):
            raise GridsError("--ema needs whole weights, and fsdp shards them; drop one of the two")

    def state_dict(self) -> dict[str, Any]:
        """Return the average and its step."""
        return {"average": self._average, "updated_at": self._updated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved average."""
        self._average, self._updated_at = state_dict["average"], state_dict["updated_at"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self._updated_at:
            return  # a micro-batch of an accumulated step
        self._updated_at = trainer.global_step
        trained = _trained(pl_module)
        if not self._average:
            self._average = {name: value.clone() for name, value in trained.items()}
            return
        pairs = [(self._average[name].to(value.device), value) for name, value in trained.items()]
        averages, values = (list(side) for side in zip(*pairs, strict=True))
        get_ema_multi_avg_fn(self.decay)(averages, values, None)
        self._average = dict(zip(trained, averages, strict=True))

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._in_place:
            self._swap(pl_module)

    @contextmanager
    def in_place(self, pl_module: Any) -> Iterator[None]:
        """Put the averages into the module for the duration of the block."""
        self._swap(pl_module)
        try:
            yield
        finally:
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: Any) -> None:
        for name, value in _trained(pl_module).items():
            if name in self._average:
                average = self._average[name].clone()
                self._average[name] = value.clone()
                value.copy_(average)
        self._in_place = not self._in_place


def _trained(pl_module: Any) -> dict[str, Tensor]:
    return {name: p.data for name, p in pl_module.named_parameters() if p.requires_grad}
