"""Measure how long a policy takes for one action chunk: LeRobot's own loop beside the fast path, stage by stage.

    python benchmarks/latency.py --family pi0 --tokens 16 --narrow      in a minute; full depth, few channels
    python benchmarks/latency.py --family pi0 --tokens 16               real sizes, random weights; 12 GB of memory
    python benchmarks/latency.py --family pi0 --tokens 16 --all         everything below; what to run on a GPU

Rows: LeRobot's dense policy, the fast path with all its tokens, K tokens, and the fast path with K tokens;
`--compiled` adds what torch.compile makes of the first and the last. All rows have the same weights, observation and
noise, at batch 1. What cannot be measured is a row that says why.

Times are read first, of exactly what acts; a GPU is synchronised before each. A stage "prefill" is all before the first
step, with the vision tower, and "steps" all from there on. Then the same is run once more to count: operations that
torch is asked for, views left out (`lerobot_grids.profiling.operations`; not of compiled rows, whose operations are the
compiler's; CUDA graphs replay those that are counted), FLOPs and bytes of weights, from which the bound follows
(`lerobot_grids.profiling.roofline`).
"""

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lerobot
import torch
import transformers
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_STATE
from torch._dynamo.utils import counters

from lerobot_grids.profiling.architectures import instantiate, make_batch, make_config
from lerobot_grids.profiling.bench import device_name
from lerobot_grids.profiling.operations import count_operations
from lerobot_grids.profiling.roofline import Card, Work, find_card
from lerobot_grids.profiling.stopwatch import CLOCKS, Timed, repeat, replaced, within
from lerobot_grids.profiling.work import WorkCounter
from lerobot_policy_grids import GridsPolicy, compress
from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError, first_line
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.modeling_grids import dense_policy
from lerobot_policy_grids.reducers import reducer_config
from lerobot_policy_grids.runtime import PRECISIONS, QUANTISATIONS

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
STAGES = ("vision", "prefill", "steps", "total")


@dataclass
class Row:
    """One way to compute an action chunk, and what was found of it.

    Attributes:
        tokens: K; None is LeRobot's policy with all tokens.
        layer: Of the vision tower, after which tokens are sampled inside it.
        runtime: "eager", "fast" or "compiled".
        quantise: Of the weights, in the fast path.
        precision: Of the fast path: `GridsPolicy.use_runtime`.
        name: For people.
        refused: Why nothing was measured.
        seconds: Stage -> seconds of each repetition. "vision" is part of "prefill".
        graphs: How many torch compiled before the first time was read.
        peak_memory_mib: Of the GPU, with the warm-up, in which the fast path computes the first chunk both ways.
        difference: Largest difference of the action chunk from that of LeRobot's loop with the same tokens, as a share
            of the range of the actions.
        operations: That are no views; None of compiled code.
        work: Stage -> FLOPs by dtype, and bytes of weights.
        bound_seconds: Stage -> the least time on this card, if its peaks are known.
        uncounted: Why the last three are missing although times were read.
    """

    tokens: int | None = None
    layer: int | None = None
    runtime: str = "eager"
    quantise: str = "none"
    precision: str = "own"
    name: str = ""
    refused: str | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    graphs: int | None = None
    peak_memory_mib: float | None = None
    difference: float | None = None
    operations: int | None = None
    work: dict[str, Work] = field(default_factory=dict)
    bound_seconds: dict[str, float] = field(default_factory=dict)
    uncounted: str | None = None

    def __post_init__(self) -> None:
        parts = ["LeRobot dense" if self.tokens is None else f"K={self.tokens}"]
        parts += [] if self.layer is None else [f"L={self.layer}"]
        chosen = (self.runtime, self.quantise, self.precision)
        self.name = " ".join([*parts, *(word for word in chosen if word not in ("eager", "none", "own"))])

    @property
    def is_compiled(self) -> bool:
        return self.runtime == "compiled"

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


def program_of(policy: Any) -> Any:
    """What the fast path runs; None where LeRobot's own loop does.

    Raises:
        GridsError: If the fast path was asked for and does not act.
    """
    runtime = policy.seam.runtime if isinstance(policy, GridsPolicy) else None
    if runtime is None:
        return None
    (program,) = runtime.programs.values() or (None,)
    if program is None:
        raise GridsError(next(iter(runtime.differences.values()), "the fast path may not act here; a warning says why"))
    return program


def stages_of(policy: Any, program: Any, is_whole: bool) -> list[Timed]:
    """The stages that can be told apart.

    Args:
        policy: As measured.
        program: What its fast path runs, or None.
        is_whole: Whether the prefill of the program is one function, compiled or recorded.
    """
    base = dense_policy(policy)
    family = get_family(base.config.type)
    stages, model = family.stages(base), family.model(base)
    if stages.steps_field is None:
        encoder = model.backbone
    else:
        named = stages.vision.named_modules()
        encoder = next((module for name, module in named if name.endswith("encoder")), stages.vision)
    if program is not None:
        prefill = program.phases.prefill
        parts = (getattr(prefill, name, None) for name in ("tower", "encoder", "backbone"))
        encoder = next((part for part in parts if part is not None), encoder)
        inside = policy.seam.inside is not None
        vision = [] if is_whole or inside else [Timed(encoder, "forward", "vision")]
        return [*vision, Timed(program, "denoise_step", "steps")]
    vision = [Timed(encoder, "forward", "vision")]
    if stages.steps_field is None or stages.decodes:
        return vision
    if hasattr(model, "denoise_step"):
        return [*vision, Timed(model, "denoise_step", "steps")]
    head = getattr(model, "action_head", model)
    if hasattr(head, "seq_pool_proj"):
        # EVO1's has all steps in one method.
        return [*vision, Timed(head, "get_action", "steps")]
    transformer = head.model if hasattr(model, "action_head") else head.transformer
    return [*vision, Timed(transformer, "forward", "steps")]


@contextmanager
def compiled_by_lerobot(policy: Any) -> Iterator[None]:
    """In this block a dense policy is what `compile_model=true` makes of it.

    Raises:
        GridsError: If LeRobot has no such option for it.
    """
    model, loops = get_family(policy.config.type).model(policy), ("sample_actions", "sample_actions_fast")
    loop = next((name for name in loops if hasattr(model, name)), None)
    if loop is None or not hasattr(policy.config, "compile_mode"):
        raise GridsError(f"LeRobot has no compile_model for a '{policy.config.type}' policy")
    with replaced(model, loop, partial(torch.compile, mode=policy.config.compile_mode)):
        yield


def time_chunks(row: Row, policy: Any, act: Callable[[], torch.Tensor], options: argparse.Namespace) -> torch.Tensor:
    """Fill in a row's times and memory, and return the action chunk. Nothing watches what torch runs.

    Raises:
        GridsError: If something else than the row says would be timed.
    """
    is_cuda = options.device.startswith("cuda")
    # What an earlier row compiled holds memory, and counts among the 8 times that torch compiles the same code.
    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(options.device)
    for _ in range(options.warmup or (3 if is_cuda or row.is_compiled else 1)):
        act()
    program = program_of(policy)
    if row.is_compiled:
        row.graphs = counters["stats"]["unique_graphs"]
        if not row.graphs:
            raise GridsError("torch.compile made no graph of it, so that eager code would be timed")
    # Not inside what torch compiled as one.
    compiled_whole = row.is_compiled and program is None
    stages = [] if compiled_whole else stages_of(policy, program, is_cuda or row.is_compiled)
    row.seconds, chunk = repeat(act, stages, options.device, options.clock, options.repeats)
    if is_cuda:
        row.peak_memory_mib = torch.cuda.max_memory_allocated(options.device) / 2**20
    return chunk


@contextmanager
def as_written(program: Any) -> Iterator[None]:
    """In this block a program runs its phases as they are, neither compiled nor recorded."""
    acts = program.prefill, program.denoise_step
    program.prefill, program.denoise_step = program.phases.prefill, program.phases.denoise_step
    try:
        yield
    finally:
        program.prefill, program.denoise_step = acts


def count(row: Row, policy: Any, act: Callable[[], torch.Tensor], card: Card | None) -> None:
    """Fill in a row's counts and bound. Nothing of the policy may be compiled by LeRobot."""
    program = program_of(policy)
    modules = [policy] if program is None else [policy, program.phases.prefill, program.phases.denoise_step]
    state = chain(*((*module.parameters(), *module.buffers()) for module in modules))
    counter = WorkCounter(state)
    with ExitStack() as stack:
        if program is not None:
            stack.enter_context(as_written(program))
        for timed in stages_of(policy, program, is_whole=False):
            stack.enter_context(within(timed, counter.within))
        operations = stack.enter_context(count_operations())
        stack.enter_context(counter)
        act()
    row.operations = None if row.is_compiled else operations.total()
    row.work = counter.stages
    if card is not None:
        tf32 = torch.get_float32_matmul_precision() != "highest" if row.precision == "own" else row.precision != "fp32"
        row.bound_seconds = {stage: card.seconds(work, tf32) for stage, work in row.work.items()}


class Rows:
    """Measures row after row of the same observation and noise, prints each and writes it.

    Args:
        policy: Dense.
        options: Of the command line.
        header: What all rows share.
        card: Its peaks, if they are known.
    """

    def __init__(self, policy: Any, options: argparse.Namespace, header: dict[str, Any], card: Card | None) -> None:
        family = get_family(policy.config.type)
        stages = family.stages(policy)
        self.options, self.header, self.card = options, header, card
        self.rows: list[Row] = []
        self._batch = make_batch(policy, options.padded or family.language_tokens, options.device)
        self._given: dict[str, torch.Tensor] = {}
        if stages.steps_field is not None:
            self._batch[OBS_LANGUAGE_ATTENTION_MASK][:, options.words :] = False
        if stages.steps_field is not None and not stages.decodes:
            shape = (1, policy.config.chunk_size, policy.config.max_action_dim)
            self._given["noise"] = torch.randn(shape, device=options.device)

    @torch.no_grad()
    def add(
        self,
        row: Row,
        policy: Any,
        expected: torch.Tensor | None = None,
        acting: AbstractContextManager[None] | None = None,
    ) -> torch.Tensor | None:
        """Measure a row, and return its action chunk; None if it is refused.

        Args:
            row: What it is.
            policy: What acts.
            expected: The chunk from which its own should not differ.
            acting: In which block it acts, to be timed.
        """

        def act() -> torch.Tensor:
            # Of families that draw the noise themselves.
            torch.manual_seed(0)
            chunk: torch.Tensor = policy.predict_action_chunk(dict(self._batch), **self._given)
            return chunk

        chunk = None
        try:
            if row.runtime != "eager" and isinstance(policy, GridsPolicy):
                policy.use_runtime(row.runtime, row.quantise, row.precision)
            with acting or nullcontext():
                chunk = time_chunks(row, policy, act, self.options)
            if expected is not None:
                row.difference = float((chunk - expected).abs().max() / (expected.max() - expected.min()))
        except Exception as error:  # whatever it is, other rows can be measured
            self.refuse(row, error)
            return None
        try:
            count(row, policy, act, self.card)
        except Exception as error:  # its times are good
            row.uncounted = reason_of(error)
        self._write(row)
        return chunk

    def refuse(self, row: Row, error: Exception) -> None:
        """Write that a row cannot be measured."""
        # Without what was measured of it before.
        row = Row(row.tokens, row.layer, row.runtime, row.quantise, row.precision)
        row.refused = reason_of(error)
        self._write(row)

    def _write(self, row: Row) -> None:
        self.rows.append(row)
        print(described(row), flush=True)
        if self.options.json:
            with self.options.json.open("a") as file:
                file.write(json.dumps(self.header | {"name": row.name, "rows": [asdict(row)]}) + "\n")


HEADER = (
    f"{'ms':24}"
    + "".join(f"{stage:>11}" for stage in (*STAGES, "p95", "p99", "bound", "MiB", "operations"))
    + "  apart"
)


def reason_of(error: Exception) -> str:
    """What an error says, in one line, and its type where it is none of ours."""
    return first_line(error) if isinstance(error, GridsError) else f"{type(error).__name__}: {first_line(error)}"


def described(row: Row) -> str:
    """One line: medians of the stages, quantiles of the total, the bound, the GPU's memory, operations, difference."""
    if row.refused is not None:
        return f"{row.name:24} refused: {row.refused}"
    cells = [f"{row.milliseconds(stage, 0.5):.1f}" if stage in row.seconds else "-" for stage in STAGES]
    cells += [f"{row.milliseconds('total', QUANTILES[name]):.1f}" for name in ("p95", "p99")]
    cells += [f"{1000 * sum(row.bound_seconds.values()):.2f}" if row.bound_seconds else "-"]
    cells += ["-" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f}"]
    cells += ["-" if row.operations is None else str(row.operations)]
    apart = "" if row.difference is None else f"  {row.difference:.1e}"
    apart += "" if row.uncounted is None else f"  not counted: {row.uncounted}"
    return f"{row.name:24}" + "".join(f"{cell:>11}" for cell in cells) + apart


def run(options: argparse.Namespace, steps: int | None = None) -> list[Row]:
    """Measure all rows, with so many steps of the flow or with the family's own number."""
    dense = build(options)
    family = get_family(dense.config.type)
    field_of_steps = family.stages(dense).steps_field
    if steps is not None and field_of_steps is not None:
        setattr(dense.config, field_of_steps, steps)
    # A budget that cannot be is found before minutes of measuring.
    compress(dense, options.tokens).detach()
    card = chosen_card(options)
    header = {
        "kind": "latency",
        "family": options.family,
        "narrow": options.narrow,
        "dtype": options.dtype,
        "cameras": options.cameras,
        "tokens": options.tokens,
        "dense_tokens": family.layout(dense).num_dense_tokens,
        "words": options.words,
        "num_steps": None if field_of_steps is None else getattr(dense.config, field_of_steps),
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "matmul": torch.get_float32_matmul_precision(),
        "card": None if card is None else asdict(card),
        "versions": {
            "torch": torch.__version__,
            "lerobot": lerobot.__version__,
            "transformers": transformers.__version__,
        },
    }
    print(HEADER)
    rows = Rows(dense, options, header, card)
    chunk = rows.add(Row(), dense)
    if options.tokens != header["dense_tokens"]:
        # What the fast path gives without fewer tokens.
        policy = compress(dense, header["dense_tokens"], runtime="eager")
        rows.add(Row(header["dense_tokens"], runtime="fast"), policy, chunk)
        dense = policy.detach()
    if options.compiled:
        rows.add(Row(runtime="compiled"), dense, acting=compiled_by_lerobot(dense))
    ways = [("none", "own"), *((way, "own") for way in options.quantise), *(("none", p) for p in options.precision)]
    layers = options.sample_after_layer or (layers_of(dense) if options.all else [])
    for layer in (None, *layers):
        inside = {} if layer is None else {"sample_after_layer": layer}
        try:
            reducer = reducer_config("grids", num_tokens=options.tokens, **inside)
            policy = compress(dense, reducer=reducer, runtime="eager")
        except GridsError as error:
            rows.refuse(Row(options.tokens, layer), error)
            continue
        expected = rows.add(Row(options.tokens, layer), policy)
        for runtime in ("fast", *(["compiled"] if options.compiled else [])):
            for quantise, precision in ways:
                rows.add(Row(options.tokens, layer, runtime, quantise, precision), policy, expected)
        dense = policy.detach()
    print(about(header, card))
    return rows.rows


def layers_of(dense: Any) -> list[int]:
    """A third of the layers of the vision tower: after 9 of π0's 27, 4 of SmolVLA's 12."""
    try:
        return [len(get_family(dense.config.type).tower(dense).encoder.layers) // 3]
    except UnsupportedPolicyError:
        # A row says that there is no such layer.
        return [0]


def chosen_card(options: argparse.Namespace) -> Card | None:
    """The card with its published peaks, or those of the command line in their place."""
    card = find_card(options.device)
    if card is None and (options.peak_tflops is None) != (options.bandwidth_gbs is None):
        raise GridsError("the peaks of this device are not in the table; give both --peak_tflops and --bandwidth_gbs")
    if card is None and options.peak_tflops:
        return Card("this device", {"float32": options.peak_tflops}, options.bandwidth_gbs, "the command line")
    if card is not None and options.peak_tflops:
        card = replace(card, tflops={"float32": options.peak_tflops}, source=f"{card.source}; and the command line")
    if card is not None and options.bandwidth_gbs:
        card = replace(card, bandwidth_gbs=options.bandwidth_gbs, source=f"{card.source}; and the command line")
    return card


def about(header: dict[str, Any], card: Card | None) -> str:
    """Where the rows were measured, and what their bound is."""
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    place = (
        f"{header['device']}, {header['threads']} threads, {header['dtype']}, products of float32 {header['matmul']}"
    )
    if card is None:
        bound = "no bound: the peaks of this device are not in the table; give --peak_tflops and --bandwidth_gbs"
    else:
        peaks = ", ".join(f"{dtype} {value:g}" for dtype, value in card.tflops.items())
        bound = (
            "bound: sum over the stages of max(FLOPs / peak, weight bytes / bandwidth), "
            f"{card.name}: {peaks} TFLOPS, {card.bandwidth_gbs:g} GB/s ({card.source})"
        )
    return f"{place}, steps {header['num_steps']}, {versions}\n{bound}"


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, help="pi0, pi05, pi0_fast, smolvla, xvla, groot, evo1, act or tiny")
    parser.add_argument("--tokens", type=int, default=16, help="K, visual tokens per camera")
    everything = "--compiled, --quantise int8, and a third of the tower's layers for --sample_after_layer"
    parser.add_argument("--all", action="store_true", help=everything)
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
    first = "runs before the first time is read; 3 by default on a GPU and of compiled rows, otherwise 1"
    parser.add_argument("--warmup", type=int, help=first)
    parser.add_argument("--repeats", type=int, help="100 by default on a GPU, otherwise 3")
    parser.add_argument("--compiled", action="store_true", help="also with torch.compile, which takes minutes")
    weights = "also with weights of 8 bits in trunk and expert: int8, int8_dynamic; needs torchao"
    parser.add_argument("--quantise", nargs="+", default=[], choices=QUANTISATIONS[1:], help=weights)
    products = "also with another precision of the fast path: fp32, tf32, bf16"
    parser.add_argument("--precision", nargs="+", default=[], choices=PRECISIONS[1:], help=products)
    peak = "10^12 FLOPs per second, of any dtype, for the bound of a card that is not known"
    parser.add_argument("--peak_tflops", type=float, help=peak)
    parser.add_argument("--bandwidth_gbs", type=float, help="10^9 bytes per second of its memory")
    parser.add_argument("--json", type=Path, help="append each row to this file as soon as it is measured, as one line")
    return parser, parser.parse_args()


def main() -> int:
    """Measure what the command line asks for; 1 if nothing could be measured."""
    parser, options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    is_cuda = options.device.startswith("cuda")
    if is_cuda:
        # As lerobot-eval does.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    options.repeats = options.repeats or (100 if is_cuda else 3)
    if options.all:
        options.compiled, options.quantise = True, options.quantise or ["int8"]
    rows: list[Row] = []
    for steps in options.num_steps:
        try:
            rows += run(options, steps)
        except GridsError as error:
            parser.exit(1, f"{parser.prog}: error: {error}\n")
    return int(all(row.refused is not None for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
