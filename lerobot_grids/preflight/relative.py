"""Are a dataset's statistics of actions those of what the policy learns: absolute, or relative to the state?"""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.processor import RelativeActionsProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from numpy.typing import NDArray

from lerobot_policy_grids.configuration_grids import base_config

from .features import DatasetFeatures
from .findings import Finding

# Statistics that differ by less than this share of the standard deviation are the same.
SAME = 0.01
# A mean that is further than this share of the standard deviation from the expected one is another.
NEAR = 0.5

Values = NDArray[np.float64]


def check_relative(source: str, config: Any, meta: LeRobotDatasetMetadata, data: DatasetFeatures) -> list[Finding]:
    """Compare the statistics of the actions with those of the episodes, which are always of absolute actions.

    Args:
        source: What the user calls the policy.
        config: Its configuration.
        meta: The dataset's metadata.
        data: The dataset's features.
    """
    base, names = base_config(config), data.names.get(ACTION)
    said = (meta.stats or {}).get(data.sources.get(ACTION, ""), {})
    action, state = (_episodes_statistics(meta, data.sources.get(name, "")) for name in (ACTION, OBS_STATE))
    if action is None or state is None or "mean" not in said or "std" not in said or len(state[0]) < len(action[0]):
        return []
    learned = _relative_dimensions(base, names, len(action[0]))
    absolute, relative = _kinds(np.ravel(said["mean"]), np.ravel(said["std"]), action, state)
    for wrong, of, learns in (
        (absolute & learned, "absolute", "actions relative to the state"),
        (relative & ~learned, "relative", "absolute actions"),
    ):
        if wrong.any():
            named = ", ".join(names[i] if names else f"dimension {i}" for i in np.flatnonzero(wrong))
            return [
                Finding(
                    f"the dataset's statistics of '{data.sources[ACTION]}' are of {of} actions for {named}, and "
                    f"{source} learns {learns}; give fit the dataset that this writes: {_command(base, meta)}"
                )
            ]
    return []


def looks_relative(mean: Values, std: Values, action_mean: Values, state_mean: Values) -> NDArray[np.bool_]:
    """For each dimension, whether this may be the mean of actions relative to the state."""
    return np.abs(mean - (action_mean - state_mean)) <= NEAR * np.maximum(std, 1e-6)


def _kinds(
    mean: Values, std: Values, action: tuple[Values, Values], state: tuple[Values, Values]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For each dimension, whether its statistics are of (absolute, relative) actions. Neither where both are alike."""
    width = len(action[0])
    state_mean, state_std = state[0][:width], state[1][:width]
    rounding = 1e-5 * np.abs(action[0]) + 1e-6
    absolute = (np.abs(mean - action[0]) <= SAME * action[1] + rounding) & (
        np.abs(std - action[1]) <= SAME * action[1] + rounding
    )
    differs = np.maximum(np.abs(state_mean), state_std) > 0.1 * action[1] + rounding
    return absolute & differs, ~absolute & differs & looks_relative(mean, std, action[0], state_mean)


def _relative_dimensions(config: Any, names: list[str] | None, width: int) -> NDArray[np.bool_]:
    """Which dimensions of the action the policy learns relative to the state, by LeRobot's own rule."""
    if not getattr(config, "use_relative_actions", False):
        return np.zeros(width, bool)
    step = RelativeActionsProcessorStep(True, getattr(config, "relative_exclude_joints", []), names)
    return np.array(step._build_mask(width))


def _episodes_statistics(meta: LeRobotDatasetMetadata, name: str) -> tuple[Values, Values] | None:
    """(Mean, standard deviation) of a feature over all episodes; None where the episodes have none."""
    columns = [f"stats/{name}/{kind}" for kind in ("mean", "std", "count")]
    files = sorted((Path(meta.root) / "meta" / "episodes").rglob("*.parquet"))
    try:
        tables = [pq.read_table(file, columns=columns) for file in files]
        mean, std, count = (
            np.array([row for table in tables for row in table[c].to_pylist()], np.float64) for c in columns
        )
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
        return None
    if mean.ndim != 2 or not len(mean):
        return None
    share = count.reshape(-1, 1) / count.sum()
    total = (share * mean).sum(0)
    return total, np.sqrt((share * (std**2 + (mean - total) ** 2)).sum(0))


def _command(config: Any, meta: LeRobotDatasetMetadata) -> str:
    """LeRobot's command that writes the dataset again with the statistics that the policy needs."""
    relative = getattr(config, "use_relative_actions", False)
    options = {
        "repo_id": meta.repo_id,
        "root": meta.root,
        "new_root": f"{meta.root}_{'relative' if relative else 'absolute'}",
        "operation.type": "recompute_stats",
    }
    if relative:
        options |= {
            "operation.relative_action": "true",
            "operation.chunk_size": config.chunk_size,
            "operation.relative_exclude_joints": json.dumps(getattr(config, "relative_exclude_joints", [])),
        }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return shlex.join(["lerobot-edit-dataset", *words])
