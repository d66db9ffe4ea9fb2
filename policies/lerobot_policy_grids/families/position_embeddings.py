"""Position embeddings that are added to tokens, for visual tokens that were read between the cells of the dense grid.

X-VLA's and BART's are learned tables with a row for each place of the dense sequence, ACT's are sinusoidal maps over
the cells. A token between cells gets what lies between theirs; at k = N these are the dense ones exactly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reducers.interpolation import bilinear
from ..reducers.layout import cell_coordinates

# Positions are read at whole 256ths of a cell, so that a cell's own centre is exactly that.
FRACTIONS = 256
# Rows of BART's table that stand for no position.
BART_OFFSET = 2


def between_cells(cells: Tensor, coordinates: Tensor) -> Tensor:
    """Position embeddings [b, k, c] at coordinates.

    Args:
        cells: Those of all cells, [b, H, W, c].
        coordinates: float32 [b, k, 2], (x, y) in [0, 1].
    """
    height, width = cells.shape[1:3]
    places = torch.stack([coordinates[..., 0] * width, coordinates[..., 1] * height], dim=-1) - 0.5
    return bilinear(cells, (places * FRACTIONS).round() / FRACTIONS)


def embeddings_of_tokens(dense: Tensor, tokens: list[Tensor], coordinates: list[Tensor] | None) -> Tensor:
    """Position embeddings [tokens of all cameras, 1 or b, c] of a batch's visual tokens, where cameras share a map.

    Args:
        dense: Those of all cells, [1, c, H, W].
        tokens: [b, k, c] of each camera.
        coordinates: Where they were read, float32 [b, k, 2] of each camera; None for the places of the first cells.
    """
    if coordinates is None:
        return torch.cat([dense.flatten(2).permute(2, 0, 1)[: camera.shape[1]] for camera in tokens])
    cells = dense.permute(0, 2, 3, 1).expand(len(tokens[0]), -1, -1, -1)
    return torch.cat([between_cells(cells, places) for places in coordinates], dim=1).transpose(0, 1)


def dense_rows(table: Tensor, segments: Sequence[int | Tensor], token_grid: tuple[int, int], batch: int) -> Tensor:
    """Rows of a table of learned positions that the tokens of a reduced sequence have in the dense one.

    A visual token between cells gets what lies between their rows; all others keep the row they were trained with.

    Args:
        table: [positions, c].
        segments: What the sequence is made of: so many tokens in a row, or a view, by the coordinates float32
            [b, k, 2] of its visual tokens; in front of them is the view's mean token. A view of none has neither.
        token_grid: (H, W) of each view.
        batch: b.

    Returns:
        [b, tokens, c].
    """
    height, width = token_grid
    rows, start = [], 0
    for segment in segments:
        if isinstance(segment, int):
            rows.append(table[start : start + segment].expand(batch, -1, -1))
            start += segment
            continue
        if segment.shape[1]:
            cells = table[start + 1 : start + 1 + height * width].unflatten(0, token_grid).expand(batch, -1, -1, -1)
            rows += [table[start : start + 1].expand(batch, -1, -1), between_cells(cells, segment)]
        start += 1 + height * width
    return torch.cat(rows, dim=1)


def _spread(count: int, token_grid: tuple[int, int], like: Tensor) -> Tensor:
    """Coordinates [b, k, 2] of k cells, evenly spaced in raster order, for tokens that were read nowhere."""
    height, width = token_grid
    cells = ((torch.arange(count, device=like.device) + 0.5) * (height * width) / max(count, 1)).long()
    places = cell_coordinates(token_grid, like.device)[cells]
    return places.expand(len(like), -1, -1)


def places_of_views(
    coordinates: list[Tensor], empty_views: int, tokens: int, token_grid: tuple[int, int]
) -> list[Tensor]:
    """Coordinates of each view, also of empty ones with so many tokens."""
    blank = _spread(tokens - 1 if tokens else 0, token_grid, coordinates[0])
    return [*coordinates, *[blank] * empty_views]
