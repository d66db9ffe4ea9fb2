"""Exponential moving average of the trained weights, by Lightning's callback."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging


class TrainedWeightsAverage(EMAWeightAveraging):
    """Lightning's average, in which frozen weights are shared instead of kept twice.

    Validation and the checkpoint that a run leaves use the average; training goes on from the weights themselves.

    Args:
        decay: Share of the average that is kept at each step.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__(decay=decay, use_buffers=False)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Make the average, on the module's device."""
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            pairs = zip(self._average_model.module.parameters(), pl_module.parameters(), strict=True)
            for average, current in pairs:
                if not current.requires_grad:
                    average.data = current.data

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave the weights alone, unlike Lightning: the state that is saved now must be able to go on."""


@contextmanager
def averaged(trainer: Trainer, pl_module: Any) -> Iterator[None]:
    """In this block the module has its averaged weights, if the trainer averages any."""
    averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    for callback in averages:
        callback.on_validation_epoch_start(trainer, pl_module)
    try:
        yield
    finally:
        for callback in averages:
            callback.on_validation_epoch_end(trainer, pl_module)
