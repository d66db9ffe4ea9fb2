"""Pictures of a table with nine small objects among clutter. One of them is named; where is it, and how is it turned?

A picture has 128 x 128 pixels, which the tower turns into 16 x 16 tokens. There are 16 kinds of objects: four shapes in
four colours. Objects are about one token large, so the mean of the tokens says little of a single one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE, OBJECTS, CLUTTER = 128, 9, 24
SHAPES = np.array(
    [
        [[1, 0, 0], [1, 0, 0], [1, 1, 1]],
        [[1, 1, 1], [0, 1, 0], [0, 1, 0]],
        [[1, 1, 0], [1, 1, 0], [1, 0, 0]],
        [[0, 1, 0], [1, 1, 1], [1, 0, 1]],
    ],
    dtype=bool,
)
COLOURS = np.array([[0.85, 0.15, 0.15], [0.15, 0.75, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.15]])
# Pixels of one cell of a shape's 3 x 3 mask; an object is three times as large.
SCALES = (2, 3, 4)
# In training a patch hides up to a third of so many objects.
HIDDEN_IN_TRAINING = 0.3


@dataclass
class Table:
    """Pictures and what is in them.

    Attributes:
        images: uint8 [n, 128, 128, 3].
        kinds: int64 [n, 9], the kind of each object: colour * 4 + shape. No kind occurs twice.
        headings: int64 [n, 9], quarter turns.
        centres: float32 [n, 9, 2], (x, y) in pixels.
    """

    images: Tensor
    kinds: Tensor
    headings: Tensor
    centres: Tensor

    def __len__(self) -> int:
        return len(self.images)


def draw(count: int, seed: int, condition: str = "plain") -> Table:
    """Draw pictures.

    Args:
        count: How many.
        seed: Of all random numbers.
        condition: "training", in which some objects are partly hidden; "plain", in which none is; "small" for the
            smallest objects alone; "novel" for objects in other hues of their colours and with a notch; "occluded" for
            objects of which a half is hidden.
    """
    random = np.random.default_rng(seed)
    kinds = np.stack([random.permutation(16)[:OBJECTS] for _ in range(count)])
    headings = random.integers(0, 4, (count, OBJECTS))
    images, centres = np.empty((count, SIDE, SIDE, 3), np.uint8), np.empty((count, OBJECTS, 2), np.float32)
    for number in range(count):
        picture = _background(random)
        placed: list[tuple[int, int, int]] = []
        for thing in range(OBJECTS):
            scale = SCALES[0] if condition == "small" else int(random.choice(SCALES))
            x, y, size = _free_place(random, placed, 3 * scale)
            placed.append((x, y, size))
            patch = picture[y : y + size, x : x + size]
            _put(patch, int(kinds[number, thing]), int(headings[number, thing]), scale, condition, random)
            centres[number, thing] = x + size / 2, y + size / 2
        picture += random.normal(0, 0.04, picture.shape)
        images[number] = picture.clip(0, 1) * 255
    return Table(*(torch.from_numpy(part) for part in (images, kinds, headings, centres)))


def _background(random: np.random.Generator) -> NDArray[np.float64]:
    """A smooth background with half-transparent patches, some in the objects' colours."""
    coarse = torch.from_numpy(random.random((1, 3, 6, 6)))
    smooth = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")[0].permute(1, 2, 0).numpy()
    picture = 0.35 + 0.35 * (smooth - 0.5)
    for _ in range(CLUTTER):
        (width, height), (x, y) = random.integers(3, 8, 2), random.integers(0, SIDE - 8, 2)
        colour = COLOURS[random.integers(4)] if random.random() < 0.5 else random.random(3)
        picture[y : y + height, x : x + width] = 0.5 * picture[y : y + height, x : x + width] + 0.5 * colour
    return picture


def _free_place(random: np.random.Generator, placed: list[tuple[int, int, int]], size: int) -> tuple[int, int, int]:
    while True:
        x, y = (int(v) for v in random.integers(1, SIDE - size - 1, 2))
        if all(max(abs(x - a), abs(y - b)) > max(size, other) + 3 for a, b, other in placed):
            return x, y, size


def _put(
    patch: NDArray[np.float64], kind: int, heading: int, scale: int, condition: str, random: np.random.Generator
) -> None:
    """Draw an object into a patch of the picture."""
    mask = np.kron(np.rot90(SHAPES[kind % 4], heading), np.ones((scale, scale), bool))
    colour = COLOURS[kind // 4] + random.normal(0, 0.08, 3)
    if condition == "novel":
        # Towards the next colour, and darker: still nearest to its own.
        colour = 0.85 * (0.75 * colour + 0.25 * np.roll(colour, 1))
        mask[: scale // 2, : scale // 2] = False
    behind = patch.copy()
    patch[mask] = colour.clip(0, 1)
    if condition == "occluded" or (condition == "training" and random.random() < HIDDEN_IN_TRAINING):
        size = patch.shape[0]
        depth = size // 2 if condition == "occluded" else size // 3
        hidden = np.rot90(np.arange(size)[:, None].repeat(size, 1), random.integers(4)) < depth
        patch[hidden] = behind[hidden]
