"""Show a `ViewResult` as a table on the screen."""

import sys

from rich.table import Table
from rich.text import Text

from ..console import wide_console
from .view import ViewResult


def print_view(result: ViewResult) -> None:
    """Print the figures, and what must be known to read the pictures."""
    height, width = result.token_grid
    table = Table(
        title=f"{result.policy} ({result.reducer}), episode {result.episode}, {result.frames} frames, "
        f"{height} x {width} token grid"
    )
    names = ["camera", "tokens", "points", "reads, cells", "in padding", "motion, cells"]
    names += ["told otherwise, cells"] if result.other_instruction is not None else []
    for name in names:
        table.add_column(name, justify="left" if name == "camera" else "right")
    for row in result.looks:
        cells: list[str | Text] = [Text(row.camera), str(row.num_tokens), f"{row.points:g}", _reads(row.reads_cells)]
        cells += [f"{100 * row.in_padding:.0f} %", _number(row.motion_cells)]
        cells += [_number(row.told_otherwise_cells)] if result.other_instruction is not None else []
        table.add_row(*cells)
    wide_console().print(table)
    if result.other_instruction is not None and not result.follows_instruction:
        print(
            f"lerobot-grids: warning: the points of reducer '{result.reducer}' of this policy do not depend on the "
            "instruction, so both are the same; train with reducer grids and language in condition_on",
            file=sys.stderr,
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _reads(cells: tuple[float, float] | None) -> str:
    if cells is None:
        return "differs"
    across, down = cells
    return f"± {across:.2g}" if across == down else f"± {across:.2g}, {down:.2g}"
