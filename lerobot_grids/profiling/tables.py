"""Show a `BenchResult` as a table on the screen and as a picture."""

from pathlib import Path

from rich.table import Table

from ..console import wide_console
from .bench import BenchResult
from .measure import STAGES, Cost

COLOURS = {"vision": "#4477aa", "projector": "#66ccee", "sampler": "#ee6677", "prefill": "#228833", "steps": "#ccbb44"}


def print_bench(result: BenchResult) -> None:
    """Print FLOPs per stage, and milliseconds if they were measured."""
    title = (
        f"{result.policy}: {result.parameters / 1e6:.0f} M parameters, {result.cameras} cameras, "
        f"{result.language_tokens} language tokens, one action chunk at batch 1"
    )
    flops = Table(title=f"{title}\nGFLOPs per stage (a multiply-add is 2)")
    for name in ("", "tokens", "prefix", *STAGES, "total", "cut"):
        flops.add_column(name, justify="left" if not name else "right", no_wrap=True)
    dense = result.costs[0]
    for cost in result.costs:
        cut = 1 - cost.total_flops / dense.total_flops
        flops.add_row(
            cost.name,
            str(cost.visual_tokens),
            str(cost.prefix_length),
            *(f"{cost.flops[stage] / 1e9:.1f}" if cost.flops[stage] else "-" for stage in STAGES),
            f"{cost.total_flops / 1e9:.1f}",
            f"-{100 * cut:.1f} %" if cost is not dense else "",
        )
    console = wide_console()
    console.print(flops)
    if not dense.latency_ms:
        return
    place = f"{result.device}, {result.threads} threads, {result.dtype}, torch {result.torch}"
    times = Table(title=f"milliseconds per stage on {place}\nmedian; p95 of the total")
    compared = any(cost.apart is not None for cost in result.costs)
    for name in ("", *STAGES, "total", "p95", "speed-up", "peak MiB", *(["apart"] if compared else [])):
        times.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for cost in result.costs:
        total = cost.latency_ms["total"]
        times.add_row(
            cost.name,
            *(f"{cost.latency_ms[stage]:.1f}" if _timed(cost, stage) else "-" for stage in STAGES),
            f"{total:.1f}",
            f"{cost.latency_p95_ms:.1f}",
            f"{dense.latency_ms['total'] / total:.2f}x" if cost is not dense else "",
            f"{cost.peak_memory_mib:.0f}",
            *([] if cost.apart is None else [f"{cost.apart:.1e}"]),
        )
    console.print(times)
    if compared:
        console.print("apart: the first action chunk from the eager one, as a share of the range of the actions")


def _timed(cost: Cost, stage: str) -> bool:
    """Whether a stage has a time: it computes something, and is none that the fast path does not divide."""
    return bool(cost.flops[stage]) and stage in cost.latency_ms


def draw_bench(result: BenchResult, path: Path) -> None:
    """Plot stacked bars: one panel for FLOPs, and one for milliseconds if they were measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    panels = [("GFLOPs", [{stage: cost.flops[stage] / 1e9 for stage in STAGES} for cost in result.costs])]
    if result.costs[0].latency_ms:
        panels.append((f"ms on {result.device}", [cost.latency_ms for cost in result.costs]))
    height = 1.2 + 0.5 * len(result.costs)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.5 * len(panels), height), squeeze=False)
    names = [cost.name for cost in result.costs]
    for axis, (unit, values) in zip(axes[0], panels, strict=True):
        left = [0.0] * len(names)
        for stage in STAGES:
            widths = [max(0.0, value.get(stage, 0.0)) for value in values]
            axis.barh(names, widths, left=left, color=COLOURS[stage], label=stage)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, total in enumerate(left):
            axis.text(total, row, f" {total:.0f}", va="center")
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * max(left))
        axis.set_xlabel(unit)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result.policy}, {result.cameras} cameras, one action chunk at batch 1")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(STAGES), loc="lower center", frameon=False, bbox_to_anchor=(0.5, -0.08))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
