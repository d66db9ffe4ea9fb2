"""Measure how long a policy takes for one action chunk: LeRobot's own loop beside the fast path, stage by stage.

    python benchmarks/latency.py --family pi0 --tokens 16 --narrow      in a minute; full depth, few channels
    python benchmarks/latency.py --family pi0 --tokens 16               real sizes, random weights; 12 GB of memory

Rows: LeRobot's dense policy, the same with K tokens, and the fast path with K tokens; `--compiled` adds what
torch.compile makes of the first and the last. All rows have the same weights, observation and noise, at batch 1. A GPU
is synchronised before each time is read. Operations are what torch is asked to compute, views left out
(`lerobot_grids.profiling.operations`); where CUDA graphs act, they are launches of graphs and copies.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lerobot
import torch
import transformers
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_STATE

from lerobot_grids.profiling.architectures import instantiate, make_batch, make_config
from lerobot_grids.profiling.bench import device_name
from lerobot_grids.profiling.operations import count_operations
from lerobot_policy_grids import GridsPolicy, compress
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.modeling_grids import dense_policy
from lerobot_policy_grids.reducers import reducer_config
from lerobot_policy_grids.runtime import PRECISIONS, QUANTISATIONS

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
STAGES = ("vision", "prefill", "steps", "total")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Row:
    """One way to compute an action chunk.

    Attributes:
        name: For people.
        operations: That are no views.
        seconds: Stage -> seconds of each repetition. "vision" is part of "prefill", which is all before the steps.
        difference: Largest difference of the action chunk from that of LeRobot's loop with the same tokens, as a share
            of the range of the actions.
    """

    name: str
    operations: int
    difference: float | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def milliseconds(self, stage: str, quantile: float) -> float:
        """A quantile of a stage's times."""
        return 1000 * float(torch.tensor(self.seconds[stage], dtype=torch.float64).quantile(quantile))


def build(options: argparse.Namespace) -> Any:
    """The dense policy, with random weights."""
    torch.manual_seed(0)
    if not options.narrow:
        return instantiate(make_config(options.family, options.cameras, dtype=options.dtype), options.device)
    shapes = {f"observation.images.{number}": (3, 112, 112) for number in range(options.cameras)}
    inputs = {name: PolicyFeature(FeatureType.VISUAL, shape) for name, shape in shapes.items()}
    inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (14,))
    outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (14,))}
    with tempfile.TemporaryDirectory() as folder:
        fields = {"max_state_dim": 32, "max_action_dim": 32}
        policy = get_family(options.family).narrow(inputs, outputs, Path(folder) / "files", **fields)
    if options.dtype == "bfloat16":
        get_family(options.family).to_bfloat16(policy)
    return policy.to(options.device).eval()


def synchronised(device: str, clock: str) -> float:
    """Seconds of a clock, after all that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return CLOCKS[clock]()


@contextmanager
def timed(owner: Any, name: str, now: Callable[[], float], spent: list[float]) -> Iterator[None]:
    """In this block add up the time that a method of an object takes."""
    run, own = getattr(owner, name), name in vars(owner)

    def method(*args: Any, **kwargs: Any) -> Any:
        start = now()
        result = run(*args, **kwargs)
        spent.append(now() - start)
        return result

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, run) if own else delattr(owner, name)


def stages_of(policy: Any) -> list[tuple[Any, str, str]]:
    """(Object, method, stage) of the stages that can be timed on their own."""
    base = dense_policy(policy)
    family = get_family(base.config.type)
    stages, model = family.stages(base), family.model(base)
    runtime = policy.seam.runtime if isinstance(policy, GridsPolicy) else None
    if stages.steps_field is None:
        backbone = model.backbone
        if runtime is None:
            return [(backbone, "forward", "vision")]
        (program,) = runtime.programs.values()
        return [(program.phases.prefill.backbone, "forward", "vision"), (program, "denoise_step", "steps")]
    named = stages.vision.named_modules()
    encoder = next((module for name, module in named if name.endswith("encoder")), stages.vision)
    if runtime is None:
        if stages.decodes:
            return [(encoder, "forward", "vision")]
        if hasattr(model, "denoise_step"):
            return [(encoder, "forward", "vision"), (model, "denoise_step", "steps")]
        transformer = model.action_head.model if hasattr(model, "action_head") else model.transformer
        return [(encoder, "forward", "vision"), (transformer, "forward", "steps")]
    (program,) = runtime.programs.values()
    if program is None:
        raise SystemExit(f"the fast path does not act: {runtime.differences}")
    prefill = program.phases.prefill
    encoder = getattr(prefill, "tower", getattr(prefill, "encoder", encoder))
    whole = runtime.name == "compiled" or next(base.parameters()).is_cuda or policy.seam.inside is not None
    return [*([] if whole else [(encoder, "forward", "vision")]), (program, "denoise_step", "steps")]


def measure(name: str, policy: Any, act: Callable[[], torch.Tensor], options: argparse.Namespace) -> tuple[Row, Any]:
    """A row, and the action chunk."""
    for _ in range(options.warmup - 1):
        act()
    with count_operations() as operations:
        chunk = act()
    row = Row(name, operations.total())
    # Not inside what torch compiled as one.
    stages = stages_of(policy) if "compiled" not in name or isinstance(policy, GridsPolicy) else []
    if not options.device.startswith("cuda"):
        row.seconds = repeat(act, stages, options)
    else:
        # To time a stage waits for the device, which makes the whole slower.
        row.seconds = repeat(act, stages, options) | repeat(act, [], options)
    if "steps" in row.seconds:
        pairs = zip(row.seconds["total"], row.seconds["steps"], strict=True)
        row.seconds["prefill"] = [total - steps for total, steps in pairs]
    return row, chunk


def repeat(
    act: Callable[[], torch.Tensor], stages: list[tuple[Any, str, str]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each repetition, of the stages and in total."""
    now = partial(synchronised, options.device, options.clock)
    seconds: dict[str, list[float]] = {stage: [] for stage in (*(stage for *_, stage in stages), "total")}
    for _ in range(options.repeats):
        with ExitStack() as stack:
            spent: dict[str, list[float]] = {stage: [] for *_, stage in stages}
            for owner, method, stage in stages:
                stack.enter_context(timed(owner, method, now, spent[stage]))
            start = now()
            act()
            seconds["total"].append(now() - start)
        for stage, values in spent.items():
            seconds[stage].append(sum(values))
    return seconds


def run(options: argparse.Namespace, steps: int | None = None) -> dict[str, Any]:
    """Measure all rows, with so many steps of the flow or with the family's own number."""
    dense = build(options)
    family = get_family(dense.config.type)
    field_of_steps = family.stages(dense).steps_field
    if steps is not None and field_of_steps is not None:
        setattr(dense.config, field_of_steps, steps)
    batch = make_batch(dense, options.padded or family.language_tokens, options.device)
    given = {}
    if field_of_steps is not None:
        batch[OBS_LANGUAGE_ATTENTION_MASK][:, options.words :] = False
    if field_of_steps is not None and not family.stages(dense).decodes:
        shape = (1, dense.config.chunk_size, dense.config.max_action_dim)
        given["noise"] = torch.randn(shape, device=options.device)
    rows: list[Row] = []

    @torch.no_grad()
    def add(name: str, policy: Any, expected: torch.Tensor | None = None) -> torch.Tensor:
        def act() -> torch.Tensor:
            # Of families that draw the noise themselves.
            torch.manual_seed(0)
            chunk: torch.Tensor = policy.predict_action_chunk(dict(batch), **given)
            return chunk

        row, chunk = measure(name, policy, act, options)
        if expected is not None:
            row.difference = float((chunk - expected).abs().max() / (expected.max() - expected.min()))
        rows.append(row)
        print_row(row)
        return chunk

    print(
        f"{'ms':24}" + "".join(f"{stage:>11}" for stage in STAGES) + f"{'p95':>11}{'p99':>11}{'operations':>12}  apart"
    )
    add("LeRobot dense", dense)
    if options.compiled:
        # What compile_model=true does.
        dense.model.sample_actions = torch.compile(dense.model.sample_actions, mode=dense.config.compile_mode)
        add("LeRobot dense compiled", dense)
        del dense.model.sample_actions
    for layer in (None, *options.sample_after_layer):
        inside = {} if layer is None else {"sample_after_layer": layer}
        policy = compress(dense, reducer=reducer_config("grids", num_tokens=options.tokens, **inside))
        name = f"K={options.tokens}" + ("" if layer is None else f" L={layer}")
        expected = add(name, policy)
        runtimes = ("fast", *(["compiled"] if options.compiled else []))
        ways = [("none", "own"), *((way, "own") for way in options.quantise), *(("none", p) for p in options.precision)]
        for runtime, (quantisation, precision) in itertools.product(runtimes, ways):
            policy.use_runtime(runtime, quantisation, precision)
            policy.warm_up(batch)
            add(" ".join([name, runtime, *({quantisation, precision} - {"none", "own"})]), policy, expected)
        dense = policy.detach()
    return {
        "kind": "latency",
        "family": options.family,
        "narrow": options.narrow,
        "dtype": options.dtype,
        "cameras": options.cameras,
        "tokens": options.tokens,
        "sample_after_layer": options.sample_after_layer,
        "quantise": options.quantise,
        "precision": options.precision,
        "dense_tokens": family.layout(dense).num_dense_tokens,
        "words": options.words,
        "num_steps": None if field_of_steps is None else getattr(dense.config, field_of_steps),
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "versions": {
            "torch": torch.__version__,
            "lerobot": lerobot.__version__,
            "transformers": transformers.__version__,
        },
        "rows": [asdict(row) for row in rows],
    }


def print_row(row: Row) -> None:
    """One line: medians of the stages, quantiles of the total."""
    cells = [f"{row.milliseconds(stage, 0.5):11.1f}" if stage in row.seconds else f"{'-':>11}" for stage in STAGES]
    tail = [f"{row.milliseconds('total', QUANTILES[name]):11.1f}" for name in ("p95", "p99")]
    apart = "" if row.difference is None else f"  {row.difference:.1e}"
    print(f"{row.name:24}" + "".join(cells + tail) + f"{row.operations:12}{apart}", flush=True)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, help="pi0, pi05, pi0_fast, smolvla, xvla, groot or act")
    parser.add_argument("--tokens", type=int, default=16, help="K, visual tokens per camera")
    more = "also with tokens sampled inside the vision tower, after so many layers"
    parser.add_argument("--sample_after_layer", type=int, nargs="+", default=[], help=more)
    parser.add_argument("--narrow", action="store_true", help="all layers and steps, but few channels and 112 px")
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--num_steps", type=int, nargs="+", default=[None], help="of the flow; the family's by default")
    parser.add_argument("--words", type=int, default=16, help="tokens of the instruction, before padding")
    parser.add_argument("--padded", type=int, help="tokens after padding; the family's own by default")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: of all threads, without other load")
    parser.add_argument("--warmup", type=int, default=1, help="runs before the first time is read")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="also with torch.compile, which takes minutes")
    weights = "also with weights of 8 bits in trunk and expert: int8, int8_dynamic; needs torchao"
    parser.add_argument("--quantise", nargs="+", default=[], choices=QUANTISATIONS[1:], help=weights)
    products = "also with products of float32 of another precision: fp32, tf32, bf16; makes a difference on a GPU"
    parser.add_argument("--precision", nargs="+", default=[], choices=PRECISIONS[1:], help=products)
    parser.add_argument("--json", type=Path, help="append the result to this file, as one line")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for steps in options.num_steps:
        try:
            result = run(options, steps)
        except GridsError as error:
            parser.exit(1, f"{parser.prog}: error: {error}\n")
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        print(
            f"{result['device']}, {result['threads']} threads, {options.dtype}, steps {result['num_steps']}, {versions}"
        )
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
