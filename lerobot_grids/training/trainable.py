"""Choose which weights of a policy are trained, by the available memory."""

from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from torch import nn

from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.modeling_grids import dense_policy

from .lora import add_lora

Trained = Literal["all", "reducer+lora", "reducer"]
# Share of the memory for weights, gradients and optimiser states; activations need the rest.
MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class TrainableChoice:
    """Which weights are trained, and the reason as a line for the user."""

    train: Trained
    reason: str


def train_only(policy: Any, train: Trained, lora_rank: int) -> bool:
    """Freeze the weights that are not trained, and add LoRA if it is.

    Args:
        policy: A grids policy, or a dense one, which has no reducer.
        train: Weights to train.
        lora_rank: Rank of the low-rank adaptation.

    Returns:
        Whether the frozen weights were converted to bfloat16.
    """
    base = dense_policy(policy)
    if train == "reducer+lora":
        # Frozen weights need no float32, and bfloat16 saves memory.
        converted = get_family(base.config.type).to_bfloat16(base)
        add_lora(base, lora_rank)
        return converted
    if train == "reducer":
        base.requires_grad_(False)
    return False


def training_bytes(policy: nn.Module) -> int:
    """Bytes of all weights, and of gradients and Adam's two states of the trainable parameters."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in policy.parameters()]
    return sum(size * (4 if trained else 1) for size, trained in sizes)


def device_memory(accelerator: str) -> tuple[str, int]:
    """Name and total memory in bytes of the device that Lightning will use."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return "this machine", psutil.virtual_memory().total


def choose_trainable(policy: Any, device: str, memory: int, with_teacher: bool = False) -> TrainableChoice:
    """Choose all weights if they fit into memory, otherwise the reducer, with LoRA where LeRobot names its targets.

    Args:
        policy: A grids policy.
        device: Name of the device for the user.
        memory: Memory of the device in bytes.
        with_teacher: Whether training all weights needs a separate, frozen teacher.
    """
    needed = training_bytes(policy)
    if with_teacher:
        needed += sum(p.numel() * p.element_size() for p in policy.base.parameters())
    what = "weights, gradients, Adam and a teacher" if with_teacher else "weights, gradients and Adam"
    numbers = f"about {needed / 2**30:.0f} GiB for {what}; {device} has {memory / 2**30:.0f} GiB"
    if needed < MEMORY_SHARE * memory:
        return TrainableChoice("all", f"training everything: {numbers}")
    because = f"because everything would need {numbers} (force it with --model.train all)"
    if not policy.base._get_default_peft_targets():
        kind = policy.base.config.type
        return TrainableChoice("reducer", f"training the reducer alone, LeRobot has no LoRA for '{kind}', {because}")
    return TrainableChoice("reducer+lora", f"training the reducer and LoRA, {because}")
