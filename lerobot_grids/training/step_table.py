"""Show a `StepBench` as tables on the screen."""

from collections.abc import Callable
from itertools import groupby

from rich.table import Table

from ..console import wide_console
from .step_bench import GPU_SIZES, StepBench, StepRow
from .step_cost import USABLE_SHARE, StepCost

MEMORY = ("weights", "grads", "AdamW", "activations", "peak")
CAPTION = (
    f"Peak: weights, gradients, AdamW's states, and the larger of activations and what AdamW needs to step.\n"
    f"Largest batch: within {100 * USABLE_SHARE:.0f} % of a GPU's memory. Not counted: --ema."
)


def print_steps(result: StepBench) -> None:
    """Print TFLOPs, then GiB and the largest batch of each GPU."""
    precision = "bf16-mixed" if result.dtype == "bfloat16" else "32-true"
    title = (
        f"{result.policy}: one training step of {result.batch_size} frames, {result.cameras} cameras, "
        f"{result.language_tokens} language tokens, {precision}\npredicted on the meta device, torch {result.torch}\n"
    )
    console = wide_console()
    flops = ["forward", "backward", *(["teacher"] if result.distill else []), "total", "cut"]
    dense = {_group(row): row.cost.flops for row in result.rows if row.cost is not None and row.name == "dense"}
    table = Table(title=f"{title}TFLOPs (a multiply-add is 2)")
    _fill(table, flops, result, lambda row, cost: _flops(cost, result.distill, dense.get(_group(row))))
    console.print(table)
    table = Table(title="GiB, and the largest batch", caption=CAPTION)
    _fill(table, [*MEMORY, *(f"{size} GB" for size in GPU_SIZES)], result, _memory)
    console.print(table)
    for train, reason in dict.fromkeys((row.train, row.reason) for row in result.rows if row.reason is not None):
        console.print(f"not predicted, training {train}: {reason}", highlight=False)


def _group(row: StepRow) -> tuple[str, bool]:
    return row.train, row.gradient_checkpointing


def _fill(
    table: Table, columns: list[str], result: StepBench, values: Callable[[StepRow, StepCost], list[str]]
) -> None:
    """Fill a table with a row for each variant, in groups of what is trained."""
    for name in ("trained", ""):
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for (train, checkpointing), rows in groupby(result.rows, _group):
        heads = iter([train, "+ checkpointing" if checkpointing else ""])
        for row in rows:
            cells = ["-"] * len(columns) if row.cost is None else values(row, row.cost)
            table.add_row(next(heads, ""), row.name, *cells)
        table.add_section()


def _flops(cost: StepCost, distill: bool, dense: int | None) -> list[str]:
    values = [cost.forward_flops, cost.backward_flops, *([cost.teacher_flops] if distill else []), cost.flops]
    cut = "" if dense in (None, cost.flops) else f"{100 * (cost.flops / dense - 1):+.1f} %"
    return [*(f"{value / 1e12:.2f}" for value in values), cut]


def _memory(row: StepRow, cost: StepCost) -> list[str]:
    values = (cost.weights, cost.gradients, cost.optimizer, cost.activations, cost.peak)
    return [*(f"{value / 2**30:.2f}" for value in values), *(str(batch or "-") for batch in row.fits().values())]
