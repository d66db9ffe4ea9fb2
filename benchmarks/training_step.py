"""Measure a training step of a policy at its real size: with all tokens and with K, samples per second and memory.

    python benchmarks/training_step.py --family pi0 --tokens 16                    random weights, the reducer and LoRA
    python benchmarks/training_step.py --family tiny --cameras 1 --train all --dtype float32 --device cpu

A step is forward, backward and AdamW on a random batch that is already on the device, as `lerobot-grids fit` computes
it: weights in bfloat16 are trained in mixed precision. Loading of frames and logging are not part of it. Beside each
row is what `lerobot-grids bench --train` predicts (`lerobot_grids.training.step_cost`).
"""

import argparse
import gc
import json
import os
import statistics
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lerobot
import torch

from lerobot_grids.profiling.architectures import instantiate, make_config, make_training_batch
from lerobot_grids.profiling.bench import device_name
from lerobot_grids.profiling.live_memory import LiveMemory
from lerobot_grids.profiling.stopwatch import CLOCKS, repeat
from lerobot_grids.training.step_cost import predict_step
from lerobot_grids.training.trainable import Trained, train_only
from lerobot_policy_grids import compress
from lerobot_policy_grids.errors import GridsError, first_line
from lerobot_policy_grids.families import get_family

GIB = 2**30


@dataclass
class Row:
    """A training step.

    Attributes:
        tokens: K; None is LeRobot's policy with all tokens.
        batch_size: Frames of a step.
        refused: Why nothing was measured, such as too little memory.
        seconds: Of each step.
        peak_gib: Largest memory of the GPU; on a CPU that of all tensors, counted in a step of its own.
        predicted_gib: What is predicted of that.
        predicted_gflops: What is predicted that a step computes.
    """

    tokens: int | None
    batch_size: int
    refused: str | None = None
    seconds: list[float] = field(default_factory=list)
    peak_gib: float | None = None
    predicted_gib: float | None = None
    predicted_gflops: float | None = None

    @property
    def samples_per_s(self) -> float:
        """Frames per second, of the median step."""
        return self.batch_size / statistics.median(self.seconds)


class Training:
    """A policy, its optimiser and a batch.

    Args:
        config: Of the dense policy.
        row: Its tokens and batch.
        options: Of the command line.
    """

    def __init__(self, config: Any, row: Row, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        dense = instantiate(deepcopy(config), options.device)
        self.policy = dense if row.tokens is None else compress(dense, row.tokens)
        train_only(self.policy, options.train, options.lora_rank)
        self.policy.train()
        self.trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        if not self.trained:
            raise GridsError(f"--train {options.train} trains nothing of it")
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        length = get_family(config.type).language_tokens
        self.batch = make_training_batch(dense, row.batch_size, length, options.device)
        mixed = getattr(config, "dtype", "float32") == "bfloat16"
        device = torch.device(options.device).type
        self.precision = partial(torch.autocast, device, torch.bfloat16, enabled=mixed)

    def step(self) -> torch.Tensor:
        """Compute one step, and return its loss []."""
        self.optimizer.zero_grad()
        with self.precision():
            loss, _ = self.policy.forward(dict(self.batch))
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def live_bytes(self) -> int:
        """Bytes of all tensors at the peak of a step, with weights, gradients and the optimiser's states."""
        self.optimizer.zero_grad()
        held = [*self.policy.parameters(), *self.policy.buffers()]
        held += [x for state in self.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
        with LiveMemory(held) as memory:
            memory.add(self.batch)
            self.step()
        return memory.peak + memory.gradients + sum(tensor.numel() * tensor.element_size() for tensor in held)


def measure(row: Row, config: Any, options: argparse.Namespace) -> None:
    """Fill in a row."""
    cost = predict_step(
        config, options.train, tokens=row.tokens, batch_size=row.batch_size, lora_rank=options.lora_rank
    )
    row.predicted_gib, row.predicted_gflops = cost.peak / GIB, cost.flops / 1e9
    is_cuda = options.device.startswith("cuda")
    gc.collect()
    training = Training(config, row, options)
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(options.device)
    for _ in range(options.warmup):
        training.step()
    seconds, _ = repeat(training.step, [], options.device, options.clock, options.repeats)
    row.seconds = seconds["total"]
    peak = torch.cuda.max_memory_allocated(options.device) if is_cuda else training.live_bytes()
    row.peak_gib = peak / GIB


def described(row: Row) -> str:
    """One line for people."""
    name = "LeRobot dense" if row.tokens is None else f"K={row.tokens}"
    if row.refused is not None:
        return f"{name:14} refused: {row.refused}"
    return (
        f"{name:14} batch {row.batch_size}: {1000 * statistics.median(row.seconds):.1f} ms per step, "
        f"{row.samples_per_s:.1f} samples/s, peak {row.peak_gib:.2f} GiB; "
        f"predicted {row.predicted_gib:.2f} GiB, {row.predicted_gflops:.1f} GFLOPs"
    )


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, help="pi0, pi05, smolvla, xvla, groot, act, tiny, ...")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16], help="K, visual tokens per camera")
    parser.add_argument("--train", default="reducer+lora", choices=get_args(Trained), help="weights that are trained")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--batch_size", type=int, help="frames of a step; the family's own by default")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="where the policy has it")
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: of all threads")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first time is read")
    parser.add_argument("--repeats", type=int, help="steps; 100 by default on a GPU, otherwise 5")
    parser.add_argument("--json", type=Path, help="append each row to this file as soon as it is measured, as one line")
    return parser, parser.parse_args()


def main() -> int:
    """Measure what the command line asks for; 1 if nothing could be measured."""
    parser, options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    is_cuda = options.device.startswith("cuda")
    if is_cuda:
        # As lerobot-train does.
        torch.set_float32_matmul_precision("high")
    options.repeats = options.repeats or (100 if is_cuda else 5)
    try:
        config = make_config(options.family, options.cameras, dtype=options.dtype)
        if options.gradient_checkpointing:
            if not hasattr(config, "gradient_checkpointing"):
                raise GridsError(f"a '{options.family}' policy has no gradient checkpointing; drop the option")
            config.gradient_checkpointing = True
    except GridsError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    size = options.batch_size or get_family(config.type).recipe.micro_batch
    rows = [Row(tokens, size) for tokens in (None, *options.tokens)]
    told = {name: value for name, value in vars(options).items() if name not in ("json", "tokens", "batch_size")}
    header = {"kind": "training-step", **told, "device": device_name(options.device)}
    header |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "lerobot": lerobot.__version__}
    for row in rows:
        try:
            measure(row, config, options)
        except Exception as error:  # whatever it is, other rows can be measured
            kind = "" if isinstance(error, GridsError) else f"{type(error).__name__}: "
            row.refused = f"{kind}{first_line(error)}"
        print(described(row), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(header | asdict(row)) + "\n")
    place = f"{header['device']}, {header['threads']} threads, {options.dtype}"
    print(f"{place}, training {options.train}, torch {torch.__version__}")
    return int(all(row.refused is not None for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
