"""The training loop of these scripts."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

# PyTorch's names of CPUs without AVX-512.
OLDER_CPUS = ("DEFAULT", "AVX2")


def descend(
    module: nn.Module,
    compute_loss: Callable[[], Tensor],
    *,
    steps: int,
    rate: float,
    warmup: float = 0.3,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Iterator[tuple[int, float]]:
    """Train the weights of a module that require gradients, and yield (steps done, loss) after each step.

    Args:
        module: What is trained.
        compute_loss: The loss of a new batch.
        steps: Number of steps, 0 or more.
        rate: Highest learning rate.
        warmup: Share of the steps in which it rises.
        betas: Adam's.
    """
    if not steps:  # of which PyTorch makes no schedule
        return
    weights = [value for value in module.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, betas=betas, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=warmup)
    for step in range(steps):
        loss = compute_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        yield step + 1, loss.item()


def lower_precision() -> torch.autocast:
    """Compute in bfloat16 in this block, on CPUs that can: others take ten times as long with it as with float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability() not in OLDER_CPUS)
