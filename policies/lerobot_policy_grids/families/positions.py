"""Position ids of the dense prefix for a reduced one.

A trunk numbers the tokens it gets. With k of N visual tokens that would be 0 .. k - 1, and everything after them would
move up by N - k: the trunk meets the instruction at other distances than it was trained with. Here each visual token
has the id of its place on the dense grid, a fraction between two of them, and what follows stays where it was. At
k = N these are the dense ids exactly. Qwen-VL's multimodal positions can be sampled in the same way.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .seam import Seam


@dataclass
class DenseNumbering:
    """How a trunk numbers its tokens as if all visual tokens were there.

    Attributes:
        seam: Knows where the visual tokens were read.
        before: Special tokens in front of each camera's visual tokens.
        after: Special tokens behind them.
        moved: By how much the ids grew in the last prefix; the denoising steps after it add the same.
    """

    seam: Seam
    before: int
    after: int
    moved: Tensor | float = 0.0


def keep_positions(trunk: nn.Module, seam: Seam, before: int, after: int) -> None:
    """From now on a trunk numbers its tokens as if all visual tokens were there.

    Args:
        trunk: Its `forward` takes inputs_embeds=[prefix, suffix], position_ids and past_key_values by name.
        seam: Knows where the visual tokens were read.
        before: Special tokens in front of each camera's visual tokens.
        after: Special tokens behind them.
    """
    seam.remember_coordinates()
    trunk.forward = partial(_forward, trunk, DenseNumbering(seam, before, after))


def release_positions(trunk: nn.Module) -> None:
    """Undo `keep_positions`. Harmless when it was not done."""
    vars(trunk).pop("forward", None)


def numbering_of(trunk: nn.Module) -> DenseNumbering | None:
    """How `keep_positions` has a trunk number its tokens; None where it was not done."""
    forward = vars(trunk).get("forward")
    return next((part for part in getattr(forward, "args", ()) if isinstance(part, DenseNumbering)), None)


def dense_positions(
    positions: Tensor, coordinates: list[Tensor], token_grid: tuple[int, int], before: int, after: int
) -> tuple[Tensor, Tensor]:
    """The ids that the tokens of a reduced prefix, and of what follows it, have in the dense one.

    Args:
        positions: int64 [b, p], consecutive, the visual tokens of all cameras first. Masked tokens have the id of the
            last one before them.
        coordinates: float32 [b, k, 2] of each camera, (x, y) in [0, 1].
        token_grid: (H, W).
        before: Special tokens in front of each camera's visual tokens.
        after: Special tokens behind them.

    Returns:
        (float32 [b, p], by how much the ids grew at the end, [b, 1]). A camera that is masked in a sample moves nothing
        there.
    """
    height, width = token_grid
    result = positions.float()
    moved = torch.zeros_like(result[:, :1])
    end = 0
    for camera in coordinates:
        start = end + before
        end = start + camera.shape[1]
        last = positions[:, start - 1 : start] if start else torch.full_like(positions[:, :1], -1)
        # Without tokens nothing tells a masked camera.
        seen = positions[:, end - 1 : end] > last if end > start else torch.ones_like(last, dtype=torch.bool)
        cells = result[:, start : start + 1] + cell_numbers(camera, token_grid)
        result[:, start:end] = torch.where(seen, cells, result[:, start:end])
        grown = (height * width - camera.shape[1]) * seen
        result[:, end:] += grown
        moved += grown
        end += after
    return result, moved


def cell_numbers(coordinates: Tensor, token_grid: tuple[int, int]) -> Tensor:
    """Where on the grid's cells, numbered row by row, coordinates are: between two cells of a row, a fraction.

    Args:
        coordinates: float32 [b, k, 2], (x, y) in [0, 1].
        token_grid: (H, W).

    Returns:
        float32 [b, k].
    """
    height, width = token_grid
    column = (coordinates[..., 0] * width - 0.5).clamp(0, width - 1)
    return (coordinates[..., 1] * height - 0.5).round().clamp(0, height - 1) * width + column


def _forward(trunk: Any, numbering: DenseNumbering, *args: Any, **kwargs: Any) -> Any:
    coordinates = numbering.seam.coordinates
    if coordinates:
        positions, prefix = kwargs["position_ids"], kwargs["inputs_embeds"][0]
        if prefix is not None and kwargs.get("past_key_values") is None:
            grid = numbering.seam.layout.token_grid
            positions, numbering.moved = dense_positions(
                positions, coordinates, grid, numbering.before, numbering.after
            )
        else:
            positions = positions + numbering.moved
        kwargs["position_ids"] = positions
    return type(trunk).forward(trunk, *args, **kwargs)
