"""Open-loop quality of a policy on held-out demonstrations, at several token budgets.

It takes seconds, and closed-loop evaluation takes minutes. But it does not rank policies: a policy with a lower loss
can succeed less often. Compare policies with `eval`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lerobot.utils.constants import ACTION
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint.files import OPTIONS_FILE
from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import BudgetError, GridsError
from lerobot_policy_grids.families import acting_batch
from lerobot_policy_grids.families.seam import present_cameras
from lerobot_policy_grids.reducers.anchored import AnchoredSampler

from ..console import write_json
from ..coordinates import CoordinateStatistics
from ..data import PLACES, LeRobotDataModule
from ..data.images import unit_images
from ..hits import ObjectHits, object_places
from ..policies import LoadedPolicy
from .task_points import TaskPoints

# Every budget and every policy gets the same noise and time of the flow.
SEED = 0
USUAL_BUDGETS = (1, 4, 8, 16, 24, 64)


@dataclass
class BudgetResult:
    """Results of a policy at one budget.

    Attributes:
        num_tokens: K, or None for a dense policy.
        loss: The policy's own training loss on held-out frames.
        error: Root mean squared error of its action chunks against the demonstrations, per action dimension, in the
            dataset's units.
        teacher_distance: Root mean squared distance of its normalised action chunks to the teacher's, from the same
            noise; None without a teacher.
        teacher_distance_by_action: The same distance per action dimension, in the dataset's units.
        coordinates: `CoordinateStatistics` of an `AnchoredSampler`, and `ObjectHits` where the dataset says where the
            named object is; empty for other reducers.
        tasks: Instruction -> where the points are in its frames, if `points_by_task` was asked for.
    """

    num_tokens: int | None
    loss: float
    error: list[float]
    teacher_distance: float | None = None
    teacher_distance_by_action: list[float] = field(default_factory=list)
    coordinates: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, TaskPoints] = field(default_factory=dict)


@dataclass
class Validation:
    """Results of one policy at several budgets.

    Attributes:
        policy: Name of the policy.
        policy_type: LeRobot's type of the policy.
        dataset: The demonstrations.
        teacher: Name of the dense policy that it is compared with, if any.
        frames: Number of held-out frames.
        num_dense_tokens: Visual tokens per camera of the dense policy.
        budgets: Results at each budget.
        num_steps: Integration steps of its flow for one action chunk; None for a policy without one.
    """

    policy: str
    policy_type: str
    dataset: str
    teacher: str | None
    frames: int
    num_dense_tokens: int | None
    budgets: list[BudgetResult] = field(default_factory=list)
    num_steps: int | None = None

    def save(self, path: Path) -> None:
        """Write all results as JSON."""
        write_json(path, asdict(self))


def budgets_of(policy: Any, asked: list[int] | None) -> list[int | None]:
    """Budgets to validate: the given ones, or the usual ones that the policy supports.

    Raises:
        BudgetError: If the policy does not support a given budget.
    """
    if not isinstance(policy, GridsPolicy) or policy.num_tokens == 0:
        if asked is not None:
            raise BudgetError("this policy has no token budget to set; drop --tokens")
        return [None]
    largest = int(policy.reducer.num_tokens_max)
    if asked is None:
        if largest == policy.num_tokens:
            return [largest]
        return [*(k for k in USUAL_BUDGETS if k < largest), largest]
    for k in asked:
        if not 1 <= k <= largest:
            raise BudgetError(f"--tokens {k}, but this checkpoint supports 1 .. {largest} visual tokens per camera")
    return list(asked)


def held_out_share(policy: str) -> float:
    """The share of episodes that a policy's training held out, from its fit.yaml; 0.1 without that file."""
    for folder in (Path(policy), Path(policy).parent):
        if (folder / OPTIONS_FILE).is_file():
            options = yaml.safe_load((folder / OPTIONS_FILE).read_text())
            return float(options["data"]["val_fraction"])
    return 0.1


def require_held_out(count: int) -> None:
    """Raise `GridsError` if nothing is held out."""
    if count == 0:
        raise GridsError("no episodes are held out for validation; the dataset needs at least two episodes")


class _Measures:
    """Metrics at one budget."""

    def __init__(self, policy: Any, size: int, device: torch.device) -> None:
        self.loss = MeanMetric().to(device)
        self.error = MeanSquaredError(squared=False, num_outputs=size).to(device)
        self.distance = MeanSquaredError(squared=False).to(device)
        self.by_action = MeanSquaredError(squared=False, num_outputs=size).to(device)
        self.coordinates: CoordinateStatistics | None = None
        reducer = getattr(policy, "reducer", None)
        if isinstance(reducer, AnchoredSampler):
            self.coordinates = CoordinateStatistics(reducer.token_grid).to(device)
            self.hits = ObjectHits(reducer.token_grid).to(device)
            policy.seam.remember_coordinates()

    def count_looks(self, policy: Any, batch: dict[str, Any], raw: dict[str, Any], names: list[str]) -> None:
        """Count the points of the last call, of each camera, and those on the named object."""
        if self.coordinates is None:
            return
        layout = policy.seam.layout
        for camera, points in zip(present_cameras(layout.cameras, batch), policy.seam.coordinates, strict=True):
            anchors = policy.reducer.anchors(points.shape[1], camera)
            self.coordinates.update(points, anchors)
            places = object_places(raw, names, layout.cameras[camera], layout.regions[camera], PLACES)
            if places is not None:
                self.hits.update(points, anchors, places.to(points))

    def result(self, num_tokens: int | None, with_teacher: bool) -> BudgetResult:
        return BudgetResult(
            num_tokens,
            float(self.loss.compute()),
            self.error.compute().reshape(-1).tolist(),
            float(self.distance.compute()) if with_teacher else None,
            self.by_action.compute().reshape(-1).tolist() if with_teacher else [],
            self.look(),
        )

    def look(self) -> dict[str, float]:
        """Where the policy looked; see `BudgetResult.coordinates`."""
        if self.coordinates is None:
            return {}
        return self.coordinates.compute() | (self.hits.compute() if self.hits.update_called else {})


@torch.no_grad()
def validate(
    loaded: LoadedPolicy,
    data: LeRobotDataModule,
    budgets: list[int | None],
    teacher: LoadedPolicy | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> list[BudgetResult]:
    """Run a policy over the held-out frames at each budget.

    Args:
        loaded: The policy and its processors.
        data: The demonstrations; loaded for this policy if they are not loaded yet.
        budgets: Budgets from `budgets_of`.
        teacher: A dense policy to compare with.
        on_progress: Called after each batch at each budget.

    Raises:
        GridsError: If nothing is held out.
    """
    policy = loaded.policy
    if data.val_dataset is None:
        data.load(policy.config)
    batches = data.val_dataloader()
    require_held_out(len(batches))
    device = next(policy.parameters()).device
    size = policy.config.output_features[ACTION].shape[0]
    measures = {k: _Measures(policy, size, device) for k in budgets}
    place_names = data.meta.features.get(PLACES, {}).get("names", [])
    for number, raw in enumerate(batches):
        batch = loaded.preprocessor(unit_images(raw))
        wanted = None if teacher is None else _chunk(teacher, teacher.preprocessor(unit_images(raw)), number)
        for k, measure in measures.items():
            if k is not None:
                policy.num_tokens = k
            torch.manual_seed(SEED + number)
            loss, _ = policy.forward(dict(batch))
            measure.count_looks(policy, batch, raw, place_names)
            measure.loss.update(loss, len(raw["task_index"]))
            normalised, chunk = _chunk(loaded, batch, number)
            steps = ~raw[f"{ACTION}_is_pad"].to(device)
            measure.error.update(chunk[steps], raw[ACTION].to(chunk)[steps])
            if wanted is not None:
                measure.distance.update(normalised.contiguous(), wanted[0].contiguous())
                measure.by_action.update(chunk.flatten(0, 1), wanted[1].flatten(0, 1))
            on_progress()
    return [measure.result(k, teacher is not None) for k, measure in measures.items()]


def _chunk(loaded: LoadedPolicy, batch: dict[str, Any], number: int) -> tuple[Tensor, Tensor]:
    """Predict an action chunk [b, steps, d] from this batch's noise: (normalised, in the dataset's units)."""
    torch.manual_seed(SEED + number)
    loaded.policy.reset()
    kind = base_config(loaded.policy.config).type
    chunk: Tensor = loaded.policy.predict_action_chunk(acting_batch(kind, dict(batch))).float()
    return chunk, loaded.postprocessor(chunk.clone()).to(chunk)


def draw_validation(result: Validation, path: Path) -> None:
    """Plot the loss, and the distance to the teacher if there is one, over the budget."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    curves = [("held-out loss", [row.loss for row in result.budgets])]
    if result.teacher is not None:
        curves.append(("distance to the teacher's actions", [row.teacher_distance or 0.0 for row in result.budgets]))
    tokens = [row.num_tokens or result.num_dense_tokens or 1 for row in result.budgets]
    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.2), squeeze=False)
    for axis, (name, values) in zip(axes[0], curves, strict=True):
        axis.plot(tokens, values, "o-", color="#4477aa")
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.minorticks_off()
        axis.set_ylim(0, 1.1 * max(values))
        axis.set_xlabel("visual tokens per camera")
        axis.set_ylabel(name)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{Path(result.policy).name}, {result.frames} held-out frames")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
