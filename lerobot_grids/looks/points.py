"""The points at which a policy reads the images of a batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families.base import image_size
from lerobot_policy_grids.families.seam import present_cameras
from lerobot_policy_grids.looks import Points, points_of
from lerobot_policy_grids.reducers.base import MapReducer

# Reducers inside the trunk whose choice the instruction decides.
TOLD_IN_TRUNK = ("fastv", "sparsevlm")


def require_points(policy: Any, source: str) -> GridsPolicy:
    """The policy, if it reads images at points.

    Raises:
        UnsupportedPolicyError: If it reads all of an image, or none.
    """
    if not isinstance(policy, GridsPolicy):
        raise UnsupportedPolicyError(
            f"{source} is a dense '{policy.config.type}' policy: it reads every cell of its token grid, so it has no "
            "points to show; give a policy that was trained with K tokens, or add --reducer grids --tokens 16 to see "
            "where untrained points start"
        )
    if policy.num_tokens == 0:
        raise UnsupportedPolicyError(
            f"{source} is blind: it was trained without visual tokens, so it has no points to show"
        )
    return policy


def follows_instruction(policy: GridsPolicy) -> bool:
    """Whether the points may depend on the instruction."""
    return "language" in policy.reducer.condition_on or policy.config.reducer.type in TOLD_IN_TRUNK


class _LookedError(Exception):
    """The points are known, and what the policy would do next is not needed."""


@torch.no_grad()
def look(policy: GridsPolicy, batch: dict[str, Any]) -> dict[str, list[Points]]:
    """Where a policy looks, without acting: trunk and action head do not run where points are known before them.

    Args:
        policy: A grids policy.
        batch: A pre-processed batch of b frames.

    Returns:
        Camera -> points of each of the b frames.

    Raises:
        GridsError: If no image reached the reducer.
    """
    layout = policy.seam.layout
    numbers = present_cameras(layout.cameras, batch)
    seen: list[list[list[np.ndarray]]] = []
    watch = _watch_map if isinstance(policy.reducer, MapReducer) else _watch_trunk
    with policy.acting_eagerly(), watch(policy, len(numbers), seen.append), suppress(_LookedError):
        policy.predict_action_chunk(dict(batch))
    policy.reset()
    if not seen:
        raise GridsError("the policy looked at no image of this batch; check its cameras")
    found: dict[str, list[Points]] = {}
    for number, coordinates in zip(numbers, zip(*seen[0], strict=True), strict=True):
        name = layout.cameras[number]
        image = batch.get(name)
        shape = image_size(policy.base.config.image_features[name].shape if image is None else image.shape[-3:])
        found[name] = [points_of(policy, number, places, shape) for places in coordinates]
    return found


# Takes the coordinates of each frame and camera.
Report = Callable[[list[list[np.ndarray]]], None]


@contextmanager
def _watch_map(policy: GridsPolicy, cameras: int, report: Report) -> Iterator[None]:
    """Report what a reducer before the trunk reads, frame by frame and camera by camera, and stop there."""
    seam = policy.seam
    before, remembered = seam.tokens, seam.coordinates

    def tokens(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        each = [camera.float().cpu().numpy() for camera in seam.coordinates or []]
        report([[camera[frame] for camera in each] for frame in range(len(each[0]))])
        raise _LookedError

    seam.remember_coordinates()
    seam.tokens = tokens  # type: ignore[method-assign]
    try:
        yield
    finally:
        del seam.tokens
        seam.coordinates = remembered


@contextmanager
def _watch_trunk(policy: GridsPolicy, cameras: int, report: Report) -> Iterator[None]:
    """Report what a reducer inside the trunk keeps, of all cameras together. The trunk is not left in its middle."""
    cells = policy.seam.layout.num_dense_tokens

    def keep(module: Any, inputs: Any, pruned: Any) -> None:
        places, coordinates = (value.cpu().numpy() for value in (pruned.places, pruned.coordinates.float()))
        report(
            [
                [points[index // cells == camera] for camera in range(cameras)]
                for index, points in zip(places, coordinates, strict=True)
            ]
        )

    handle = policy.reducer.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
