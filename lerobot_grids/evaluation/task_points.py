"""Where a policy's points are in the frames of each task, and where another task's instruction takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.errors import UnsupportedPolicyError
from lerobot_policy_grids.reducers.anchored import AnchoredSampler

from ..coordinates import CoordinateStatistics
from ..data import PLACES, LeRobotDataModule
from ..data.images import unit_images
from ..hits import ObjectHits, object_places
from ..looks.points import look
from ..policies import LoadedPolicy


@dataclass
class TaskPoints:
    """Where a policy's points are in the frames of one task, over all cameras.

    Attributes:
        frames: Number of held-out frames.
        motion: How far points move from image to image, in cells; see `CoordinateStatistics`.
        on_object: Share of images with a point on the named object; None where the dataset does not say where the
            object is, or no image shows it.
        anchors_on_object: Share of images with an anchor on it: what the points would reach without looking.
        told_otherwise_cells: Mean distance of a point to where it is when the policy is told the next task's
            instruction; None if the dataset has one task.
        on_object_told_otherwise: Share of images with a point on the task's own object then.
    """

    frames: int
    motion: float
    on_object: float | None = None
    anchors_on_object: float | None = None
    told_otherwise_cells: float | None = None
    on_object_told_otherwise: float | None = None


def require_anchors(policy: Any, source: str) -> GridsPolicy:
    """The policy, if it has points that start from anchors.

    Raises:
        UnsupportedPolicyError: If it has none.
    """
    if not isinstance(policy, GridsPolicy) or not isinstance(policy.reducer, AnchoredSampler) or not policy.num_tokens:
        raise UnsupportedPolicyError(
            f"{source} has no points that move, so --by_task has nothing to count; give a policy with reducer 'grids'"
        )
    return policy


class _Counts:
    """What is counted of one task at one budget."""

    def __init__(self, token_grid: tuple[int, int]) -> None:
        self.frames = 0
        self.points = CoordinateStatistics(token_grid)
        self.hits, self.hits_otherwise = ObjectHits(token_grid), ObjectHits(token_grid)
        self.moved = MeanMetric()

    def result(self) -> TaskPoints:
        moved = float(self.moved.compute()) if self.moved.update_called else None
        hits, otherwise = (hits.compute() if hits.update_called else {} for hits in (self.hits, self.hits_otherwise))
        return TaskPoints(
            self.frames,
            self.points.compute()["motion"],
            hits.get("on_object"),
            hits.get("anchors_on_object"),
            moved,
            otherwise.get("on_object"),
        )


def points_by_task(
    loaded: LoadedPolicy,
    data: LeRobotDataModule,
    budgets: list[int | None],
    on_progress: Callable[[], None] = lambda: None,
) -> list[dict[str, TaskPoints]]:
    """Look at the held-out frames, told their own instruction and the next task's. The policy does not act.

    Args:
        loaded: A policy that `require_anchors` accepts, and its processors.
        data: The demonstrations, loaded for this policy.
        budgets: Budgets from `budgets_of`.
        on_progress: Called after each batch at each budget.

    Returns:
        For each budget, instruction -> where the points are.
    """
    policy = loaded.policy
    own = policy.num_tokens
    tasks = list(data.meta.tasks.index)
    following = dict(zip(tasks, [*tasks[1:], tasks[0]], strict=True))
    counts: list[dict[str, _Counts]] = [{} for _ in budgets]
    names = data.meta.features.get(PLACES, {}).get("names", [])
    for raw in data.val_dataloader():
        told = [list(raw["task"])]
        told += [[following[task] for task in told[0]]] if len(tasks) > 1 else []
        with policy.seam.share_vision():
            batches = [loaded.preprocessor(unit_images(raw | {"task": texts})) for texts in told]
            for k, some in zip(budgets, counts, strict=True):
                policy.num_tokens = k
                looks = [look(policy, batch) for batch in batches]
                for task in dict.fromkeys(told[0]):
                    rows = [i for i, text in enumerate(told[0]) if text == task]
                    count = some.setdefault(task, _Counts(policy.reducer.token_grid))
                    count.frames += len(rows)
                    _count(count, policy, looks, raw, names, rows)
                on_progress()
    policy.num_tokens = own
    return [{task: some[task].result() for task in tasks if task in some} for some in counts]


def _count(
    count: _Counts, policy: GridsPolicy, looks: list[Any], raw: dict[str, Any], names: list[str], rows: list[int]
) -> None:
    """Count some rows of a batch, which was looked at under one or two instructions."""
    layout = policy.seam.layout
    for camera, name in enumerate(layout.cameras):
        if name not in looks[0]:
            continue
        seen = [_coordinates([found[name][row] for row in rows]) for found in looks]
        anchors = policy.reducer.anchors(seen[0].shape[1], camera).cpu()
        count.points.update(seen[0], anchors)
        places = object_places(raw, names, name, layout.regions[camera], PLACES)
        for points, hits in zip(seen, (count.hits, count.hits_otherwise), strict=False):
            if places is not None:
                hits.update(points, anchors, places[rows].cpu())
        if len(seen) == 2:
            count.moved.update(((seen[1] - seen[0]) * count.points.cells).norm(dim=-1))


def _coordinates(points: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack([each.coordinates for each in points])).float()
