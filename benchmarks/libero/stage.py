"""What the stages of training the trunk of a small policy have in common: their command line, and how they end."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn


def parse(
    description: str | None, start: str, steps: int, pointing_steps: int | None = None, thin_steps: int | None = None
) -> argparse.Namespace:
    """The command line of a stage that learns from scenes and demonstrations; sets threads and seed.

    Args:
        description: Of the script.
        start: Script that made the policy to start from.
        steps: Training steps without `--steps`.
        pointing_steps: Of those that come before, in which it only learns to point; None for a stage without them.
        thin_steps: Of those between, in which it reads some of the visual tokens; None for a stage without them.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, nargs="+", help="files that scenes.py made")
    parser.add_argument("--dataset", required=True, help="recorded demonstrations")
    parser.add_argument("--start", required=True, type=Path, help=f"policy that {start} made")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=steps)
    if pointing_steps is not None:
        parser.add_argument("--pointing_steps", type=int, default=pointing_steps, help="before them, of pointing alone")
    if thin_steps is not None:
        parser.add_argument("--thin_steps", type=int, default=thin_steps, help="between, with some visual tokens")
    parser.add_argument("--instruction", default="pick up the {} and place it in the basket", help="of the scenes")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    return arguments


def keep(policy: Any, arguments: argparse.Namespace, file: str, said: dict[str, Any]) -> None:
    """Save a policy with the processors of its start, print what was measured, and keep it beside the policy."""
    shutil.copytree(arguments.start, arguments.output, dirs_exist_ok=True)
    policy.save_pretrained(arguments.output)
    text = json.dumps(said, indent=2)
    print(text)
    (arguments.output / file).write_text(text + "\n")


def action_head(width: int, chunk: torch.Size, hidden: int = 256) -> nn.Sequential:
    """Reads a chunk of actions off a token."""
    return nn.Sequential(nn.RMSNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, chunk.numel()))


def hand_on(layer: nn.Module) -> None:
    """Make a layer of a language model one that hands on what it gets."""
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.mlp.down_proj.weight)
