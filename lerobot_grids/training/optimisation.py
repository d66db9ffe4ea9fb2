"""Parameter groups of the optimiser, and the learning rate over the steps."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lerobot_policy_grids.errors import GridsError

# Learning rate at the end of a run, as a share of its peak.
FINAL_SHARE = 0.005


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], lr: float, reducer_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate and weight decay; norms and biases have no weight decay.

    Raises:
        GridsError: If no parameter is trainable.
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
    """Linear warm-up, then a cosine decay to `FINAL_SHARE` of the peak.

    The rate depends on the step only: a run that is resumed with more steps follows the longer schedule.
    """
    warmup = max(1, min(warmup, steps - 1))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
