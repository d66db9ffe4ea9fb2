"""Compare what one training step costs: all tokens and K, by what is trained, with and without checkpointing."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import torch

from lerobot_policy_grids import compress
from lerobot_policy_grids.checkpoint import read_config
from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families import get_family

from ..policies import find_source
from ..profiling.architectures import architectures, instantiate, make_config
from .step_cost import StepCost, predict_step
from .trainable import Trained

# Memory of common GPUs, in GiB.
GPU_SIZES = (8, 12, 16, 24, 80)
NO_REDUCER = "the dense policy has no reducer to train"


@dataclass
class StepRow:
    """A variant of the training step.

    Attributes:
        name: "dense", "K=16", "pool K=16".
        train: Weights that are trained.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        cost: What it costs, or None.
        reason: Why there is no cost.
    """

    name: str
    train: Trained
    gradient_checkpointing: bool
    cost: StepCost | None = None
    reason: str | None = None

    def fits(self) -> dict[str, int]:
        """Memory of a GPU in GiB -> the largest batch that fits it, or 0."""
        return {} if self.cost is None else {str(size): self.cost.largest_batch(size * 2**30) for size in GPU_SIZES}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and the batches as plain values."""
        cost = None if self.cost is None else self.cost.to_dict()
        return asdict(self) | {"cost": cost, "fits": self.fits()}


@dataclass
class StepBench:
    """Costs of a training step of one policy in several variants."""

    policy: str
    cameras: int
    language_tokens: int
    batch_size: int
    dtype: str
    distill: bool
    torch: str = torch.__version__
    rows: list[StepRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return vars(self) | {"rows": [row.to_dict() for row in self.rows]}


def bench_steps(
    policy: str,
    tokens: list[int],
    *,
    reducers: list[str] | None = None,
    cameras: int = 2,
    language_tokens: int | None = None,
    batch_size: int | None = None,
    dtype: str = "bfloat16",
    distill: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> StepBench:
    """Predict a policy's training steps with all tokens and at each token budget, without its weights.

    Args:
        policy: Name of an architecture, or a checkpoint, of which only the configuration is read.
        tokens: Budgets, in visual tokens per camera.
        reducers: Names of reducers; None takes "grids".
        cameras: Number of cameras for an architecture; a checkpoint has a fixed number.
        language_tokens: Instruction tokens after padding; None takes the family's default.
        batch_size: Frames of a step; None takes the micro-batch of the family's recipe.
        dtype: Precision of an architecture, for families that support both.
        distill: Whether the policies with few tokens also imitate a dense teacher.
        on_progress: Called with the name of what is being predicted.

    Raises:
        BudgetError: If a budget exceeds the dense tokens.
        UnsupportedPolicyError: If the policy is unknown.
        GridsError: If no step of it can be predicted.
    """
    config = make_config(policy, cameras, None, dtype) if policy in architectures() else dense_config(policy)
    family = get_family(config.type)
    result = StepBench(
        policy,
        cameras=len(config.image_features),
        language_tokens=language_tokens or family.language_tokens,
        batch_size=batch_size or family.recipe.micro_batch,
        dtype=getattr(config, "dtype", "float32"),
        distill=distill,
    )
    ways: list[tuple[str, str | None, int | None]] = [("dense", None, None)]
    for kind in reducers or ["grids"]:
        ways += [(f"K={k}" if kind == "grids" else f"{kind} K={k}", kind, k) for k in tokens]
    dense = instantiate(deepcopy(config), "meta")
    # Check all budgets before the first prediction, which takes seconds.
    for _, reducer, k in ways[1:]:
        compress(dense, k, reducer or "grids").detach()
    del dense
    for train in reversed(get_args(Trained)):
        for checkpointing in (False, True) if hasattr(config, "gradient_checkpointing") else (False,):
            for name, reducer, k in ways:
                row = StepRow(name, train, checkpointing)
                if on_progress is not None:
                    on_progress(f"{name}, training {train}{', checkpointing' if checkpointing else ''}")
                options = {"tokens": k, "reducer": reducer, "distill": distill, "language_tokens": language_tokens}
                options |= {"gradient_checkpointing": checkpointing, "batch_size": result.batch_size}
                _fill(row, config, options)
                result.rows.append(row)
    if all(row.cost is None for row in result.rows):
        raise GridsError("; ".join(dict.fromkeys(row.reason or "" for row in result.rows if row.reason != NO_REDUCER)))
    return result


def dense_config(policy: str) -> Any:
    """The configuration of the dense policy of a checkpoint; its weights are not fetched."""
    folder = find_source(policy, weights=False)
    if folder is None:
        raise GridsError(f"'{policy}' has no checkpoint; choose from {', '.join(architectures())}")
    return base_config(read_config(folder))


def _fill(row: StepRow, config: Any, options: dict[str, Any]) -> None:
    if row.train == "reducer" and options["tokens"] is None:
        row.reason = NO_REDUCER
        return
    try:
        row.cost = predict_step(config, row.train, **options)
    except (GridsError, NotImplementedError) as error:
        row.reason = str(error).splitlines()[0]
