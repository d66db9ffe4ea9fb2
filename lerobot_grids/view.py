"""Drawing where a policy looks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from lerobot_policy_grids.modeling_grids import GridsPolicy

POINT_COLOUR, RING_COLOUR = (255, 230, 0), (0, 0, 0)
# Small camera images are enlarged to at least this many pixels, so that points can be told apart.
MIN_SIZE = 384


@contextmanager
def watch_coordinates(policy: Any) -> Iterator[list[Tensor]]:
    """Collect the coordinates of each look while the block runs.

    Yields:
        A list that grows by one float32 [cameras * b, k, 2] per look. It stays empty for a dense policy.
    """
    seen: list[Tensor] = []
    if not isinstance(policy, GridsPolicy):
        yield seen
        return
    handle = policy.reducer.register_forward_hook(
        lambda module, inputs, output: seen.append(output.coordinates.detach().cpu())
    )
    try:
        yield seen
    finally:
        handle.remove()


def draw_points(
    frame: np.ndarray,
    coordinates: np.ndarray,
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    title: str = "",
) -> np.ndarray:
    """Draw sampled points on a camera image.

    Args:
        frame: uint8 [h, w, 3].
        coordinates: [k, 2], (x, y) in [0, 1] of the image that the vision tower saw; may be empty.
        region: Where the camera image lies in that one, (left, top, right, bottom), as `Adapter.image_region`
            gives it. Points outside it looked at padding and are not drawn.
        title: Text in the upper left corner.

    Returns:
        uint8 image, enlarged by a whole factor.
    """
    factor = max(1, -(-MIN_SIZE // frame.shape[0]))
    image = Image.fromarray(frame).resize((frame.shape[1] * factor, frame.shape[0] * factor), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = region
    radius = max(4, image.height // 70)
    for x, y in np.asarray(coordinates, dtype=float).reshape(-1, 2):
        column = (x - left) / (right - left) * image.width
        row = (y - top) / (bottom - top) * image.height
        if 0 <= column <= image.width and 0 <= row <= image.height:
            box = (column - radius, row - radius, column + radius, row + radius)
            draw.ellipse(box, fill=POINT_COLOUR, outline=RING_COLOUR, width=max(1, radius // 3))
    if title:
        draw.rectangle((0, 0, 8 + 6 * len(title), 16), fill=(0, 0, 0))
        draw.text((4, 2), title, fill=(255, 255, 255))
    return np.asarray(image)


def contact_sheet(rows: list[list[np.ndarray]], path: Path) -> None:
    """Save images of one size as a PNG, row by row; shorter rows are filled with black."""
    columns = max(len(row) for row in rows)
    blank = np.zeros_like(rows[0][0])
    lines = [np.concatenate(row + [blank] * (columns - len(row)), axis=1) for row in rows]
    Image.fromarray(np.concatenate(lines, axis=0)).save(path)
