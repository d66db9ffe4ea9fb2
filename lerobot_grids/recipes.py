"""How a family is trained unless told otherwise: steps, batch, learning rate, and what of it is trained.

The π recipes are the paper's (its openpi configurations: 30 k steps of 128, peak 5e-5 after 10 k steps of warm-up).
"""

from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from torch import nn

Trained = Literal["all", "reducer+lora", "reducer"]
# Share of a device's memory that weights, gradients and optimiser states may take; activations need the rest.
MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Recipe:
    """Defaults of a family.

    Attributes:
        steps: Training steps.
        batch: Frames per step, over all devices and accumulated micro-batches.
        micro_batch: Frames per device at once.
        lr: Peak learning rate.
        warmup: Share of the steps in which the learning rate rises linearly.
    """

    steps: int
    batch: int
    micro_batch: int
    lr: float
    warmup: float


PI = Recipe(steps=30_000, batch=128, micro_batch=8, lr=5e-5, warmup=1 / 3)
# LeRobot policy type -> recipe; a family without one takes OTHER.
OTHER = Recipe(steps=20_000, batch=64, micro_batch=8, lr=5e-5, warmup=0.05)
RECIPES = {
    "pi0": PI,
    "pi05": PI,
    "pi0_fast": PI,
    # LeRobot's own preset for fine-tuning it.
    "smolvla": Recipe(steps=20_000, batch=64, micro_batch=64, lr=1e-4, warmup=0.05),
    "tiny_smolvla": Recipe(steps=2_000, batch=32, micro_batch=32, lr=8e-4, warmup=0.05),
}


def recipe_for(policy_type: str) -> Recipe:
    """The recipe of a dense policy's LeRobot type."""
    return RECIPES.get(policy_type, OTHER)


def base_type(config: Any) -> str:
    """LeRobot's type of a dense policy, or of the one inside a grids policy."""
    return str(config.base.type if config.type == "grids" else config.type)


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
    """Train everything if that fits, else the reducer and low-rank adapters.

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
