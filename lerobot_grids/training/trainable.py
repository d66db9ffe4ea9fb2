"""What of a policy is trained, and whether that fits the memory."""

from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from torch import nn

Trained = Literal["all", "reducer+lora", "reducer"]
# Share of a device's memory that weights, gradients and optimiser states may take; activations need the rest.
MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class TrainableChoice:
    """What is trained, and why, in a line for the user."""

    train: Trained
    reason: str


def training_bytes(policy: nn.Module) -> int:
    """Memory that training all parameters the policy leaves trainable takes: weights, gradients, Adam's two states."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in policy.parameters()]
    return sum(size * (4 if trained else 1) for size, trained in sizes)


def device_memory(accelerator: str) -> tuple[str, int]:
    """Name and total memory in bytes of the device that Lightning will train on."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return "this machine", psutil.virtual_memory().total


def choose_trainable(policy: Any, device: str, memory: int, with_teacher: bool = False) -> TrainableChoice:
    """Train everything if that fits, else the reducer and LoRA.

    Args:
        policy: A grids policy.
        device: What to call the device.
        memory: Its memory in bytes.
        with_teacher: Whether training everything needs a second, frozen base as a teacher.
    """
    needed = training_bytes(policy)
    if with_teacher:
        needed += sum(p.numel() * p.element_size() for p in policy.base.parameters())
    what = "weights, gradients, Adam and a teacher" if with_teacher else "weights, gradients and Adam"
    numbers = f"about {needed / 2**30:.0f} GiB for {what}; {device} has {memory / 2**30:.0f} GiB"
    if needed < MEMORY_SHARE * memory:
        return TrainableChoice("all", f"training everything: {numbers}")
    return TrainableChoice(
        "reducer+lora",
        f"training the reducer and LoRA, because everything would need {numbers} (--model.train all insists)",
    )
