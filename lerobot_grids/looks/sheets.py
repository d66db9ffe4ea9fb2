"""Sheets of pictures in rows and columns, with labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .drawing import Colour, font

BACKGROUND, INK, FAINT = (16, 16, 20), (240, 240, 240), (165, 165, 172)
GAP = 6
TEXT = 13
LINE = TEXT + 7
# Characters of a line that are measured at all.
LONGEST = 500


@dataclass(frozen=True)
class Line:
    """A line of text above the pictures, with a mark in a colour."""

    text: str
    colour: Colour | None = None


@dataclass(frozen=True)
class Row:
    """A row of pictures, uint8 [h, w, 3] each, and its label."""

    label: str
    pictures: Sequence[np.ndarray]


def label_width(labels: Sequence[str]) -> int:
    """Pixels that the labels of rows need."""
    return max((round(font(TEXT).getlength(label)) for label in labels), default=0)


def sheet(lines: Sequence[Line], columns: Sequence[str], rows: Sequence[Row]) -> np.ndarray:
    """Lay pictures out under lines of text.

    Args:
        lines: Text above; too long ones are cut at the right border.
        columns: Label of each column; without any, they take no line.
        rows: As many pictures as there are columns, in each. A row is as high as its highest picture.

    Returns:
        uint8 image; both sides are even, as video codecs want.
    """
    indent = label_width([row.label for row in rows]) + 2 * GAP
    widths = [max(row.pictures[i].shape[1] for row in rows) for i in range(len(columns))]
    heights = [max(picture.shape[0] for picture in row.pictures) for row in rows]
    width = indent + sum(widths) + GAP * len(widths)
    top = GAP + LINE * (len(lines) + any(columns))
    height = top + sum(heights) + GAP * len(rows)
    canvas = Image.new("RGB", (width + width % 2, height + height % 2), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        y = GAP + number * LINE
        if line.colour is not None:
            pen.ellipse((GAP, y + 2, GAP + TEXT - 2, y + TEXT), fill=line.colour)
        x = GAP if line.colour is None else 2 * GAP + TEXT
        pen.text((x, y), _fitting(line.text, width - x - GAP), INK, font(TEXT))
    x = indent
    for title, across in zip(columns, widths, strict=True):
        pen.text((x, GAP + len(lines) * LINE), title, FAINT, font(TEXT))
        x += across + GAP
    y = top
    for row, down in zip(rows, heights, strict=True):
        pen.text((GAP, y + (down - TEXT) / 2), row.label, FAINT, font(TEXT))
        x = indent
        for picture, across in zip(row.pictures, widths, strict=True):
            canvas.paste(Image.fromarray(picture), (x, y))
            x += across + GAP
        y += down + GAP
    return np.asarray(canvas)


def _fitting(text: str, width: float) -> str:
    """The start of a text that is not wider than this."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text[:LONGEST]).split())
    if font(TEXT).getlength(plain) <= width:
        return plain
    while plain and font(TEXT).getlength(f"{plain}…") > width:
        plain = plain[:-1]
    return f"{plain}…"
