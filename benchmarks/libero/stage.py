"""What the stages of training the trunk of a small policy have in common: their command line, and how they end."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn


def command_line(description: str | None, start: str, steps: int) -> argparse.ArgumentParser:
    """The command line of a stage that learns from scenes and demonstrations.

    Args:
        description: Of the script.
        start: Script that made the policy to start from.
        steps: Training steps without `--steps`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, nargs="+", help="files that scenes.py made")
    parser.add_argument("--dataset", required=True, help="recorded demonstrations")
    parser.add_argument("--start", required=True, type=Path, help=f"policy that {start} made")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--instruction", default="pick up the {} and place it in the basket", help="of the scenes")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line of a stage, and set threads and seed."""
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
