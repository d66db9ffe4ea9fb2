"""The optimiser and its learning rate over the steps."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lerobot_policy_grids.errors import GridsError

# Of the peak learning rate, at the end of a run.
FINAL_SHARE = 0.005


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], lr: float, reducer_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of trainable parameters by learning rate and weight decay; norms and biases are not decayed.

    Raises:
        GridsError: If nothing is trainable.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            rate = reducer_lr if name.startswith("policy.reducer.") else lr
            groups.setdefault((rate, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    if not groups:
        raise GridsError("nothing is left to train: this reducer has no parameters; give --model.train all")
    return [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()]


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine down to `FINAL_SHARE`.

    A function of the step alone: a run that is resumed for longer follows the longer schedule.
    """
    warmup = max(1, min(warmup, steps - 1))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
