"""Draw points on a camera's image, with the letterbox padding that the vision tower sees around it."""

from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lerobot_policy_grids.looks import Points

Colour = tuple[int, int, int]
# Told the true instruction; told another one.
TRUE, OTHER = (255, 226, 40), (60, 220, 255)
# A point in the padding, and the padding itself.
LOST, PADDING, HATCH = (255, 80, 80), (38, 38, 42), (58, 58, 64)
RING = (0, 0, 0)
# Opacity of the area that a token reads, and of its edge.
FILL, EDGE = 26, 150
# Drawn so many times larger and then reduced, for smooth edges.
SMOOTH = 2


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and has the letters of most languages."""
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def canvas_size(points: Points, shape: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of a picture of what the vision tower sees, whose longer side has `side` pixels.

    Args:
        points: Has the camera's region.
        shape: Height and width of the camera's image.
        side: Pixels.
    """
    left, top, right, bottom = points.region
    width, height = shape[1] / (right - left), shape[0] / (bottom - top)
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def draw(frame: np.ndarray, points: Points, *, side: int = 240, colour: Colour = TRUE) -> np.ndarray:
    """Draw what the vision tower sees of a camera, and where it is read.

    A disc is as wide as a token reads, and its centre is marked. Discs end at the border of the picture. Padding is
    hatched, and a point in it is a red cross: it has left the camera's image.

    Args:
        frame: uint8 [h, w, 3], the camera's image.
        points: Where it is read.
        side: Longer side of the result in pixels.
        colour: Of the points.

    Returns:
        uint8 image.
    """
    width, height = canvas_size(points, frame.shape[:2], side)
    left, top, right, bottom = points.region
    box = [round(left * width), round(top * height), round(right * width), round(bottom * height)]
    box[2:] = max(box[0] + 1, box[2]), max(box[1] + 1, box[3])
    canvas = _padding(width, height)
    canvas.paste(_resized(frame, box[2] - box[0], box[3] - box[1]), (box[0], box[1]))
    large = (width * SMOOTH, height * SMOOTH)
    overlay = Image.new("RGBA", large, (*colour, 0))
    pen = ImageDraw.Draw(overlay)
    places = np.asarray(points.coordinates, dtype=float).reshape(-1, 2) * large
    radius = SMOOTH * max(2.0, side / 72)
    if points.reads is not None:
        area = _area(*(max(1, round(reach * size)) for reach, size in zip(points.reads, large, strict=True)), colour)
        # Areas first, so that none hides a centre.
        for x, y in places:
            _stamp(overlay, area, round(x), round(y))
    for (x, y), is_lost in zip(places, points.in_padding(), strict=True):
        if is_lost:
            arm = 1.4 * radius
            for sign in (1, -1):
                pen.line((x - arm, y - sign * arm, x + arm, y + sign * arm), fill=LOST, width=2 * SMOOTH)
        else:
            dot = (x - radius, y - radius, x + radius, y + radius)
            pen.ellipse(dot, fill=(*colour, 255), outline=(*RING, 255), width=SMOOTH)
    canvas.alpha_composite(overlay.resize((width, height), Image.Resampling.BOX))
    return np.asarray(canvas.convert("RGB"))


@cache
def _area(across: int, down: int, colour: Colour) -> Image.Image:
    """A disc with these half axes."""
    area = Image.new("RGBA", (2 * across + 1, 2 * down + 1), (*colour, 0))
    disc = (0, 0, 2 * across, 2 * down)
    ImageDraw.Draw(area).ellipse(disc, fill=(*colour, FILL), outline=(*colour, EDGE), width=SMOOTH)
    return area


def _stamp(overlay: Image.Image, area: Image.Image, x: int, y: int) -> None:
    """Lay an area over a picture, around a point; what is outside the picture is left out."""
    left, top = x - area.width // 2, y - area.height // 2
    hidden = (max(0, -left), max(0, -top))
    if hidden[0] < area.width and hidden[1] < area.height:
        overlay.alpha_composite(area, (left + hidden[0], top + hidden[1]), hidden)


def _resized(frame: np.ndarray, width: int, height: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(frame))
    # Enlarged pixels stay pixels: a policy sees no more than these.
    larger = width >= 2 * image.width
    return image.resize((width, height), Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


@cache
def _hatched(width: int, height: int) -> Image.Image:
    canvas = Image.new("RGBA", (width, height), PADDING)
    pen = ImageDraw.Draw(canvas)
    for start in range(-height, width, 8):
        pen.line((start, height, start + height, 0), fill=HATCH)
    return canvas


def _padding(width: int, height: int) -> Image.Image:
    return _hatched(width, height).copy()
