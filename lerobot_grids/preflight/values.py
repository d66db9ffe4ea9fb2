"""Are the numbers in a dataset's files finite, in order, and what its metadata says of them?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.utils.constants import ACTION, OBS_STATE
from numpy.typing import NDArray

from lerobot_policy_grids.errors import first_line

from .features import DatasetFeatures
from .findings import Finding, warning
from .relative import looks_relative

# Statistics further than this share of the standard deviation from the data's mean describe other data.
DRIFT = 0.5
# So does a standard deviation that is more than this many times larger or smaller.
SPREAD = 1.5
# A joint with less spread than this share of its mean never moves; LeRobot's statistics of it have some rounding.
STILL = 1e-6


def data_files(meta: LeRobotDatasetMetadata) -> list[Path]:
    """The data files of a dataset that are on this machine."""
    return sorted((Path(meta.root) / "data").rglob("*.parquet"))


def check_values(
    meta: LeRobotDatasetMetadata, data: DatasetFeatures, episodes: Sequence[int], tolerance_s: float
) -> list[Finding]:
    """Read the numbers of state, action and time of some episodes, and check them.

    Args:
        meta: The dataset's metadata; its data files must be on this machine.
        data: Its features.
        episodes: The episodes that are used.
        tolerance_s: How far a time stamp may be from a video's frame.
    """
    vectors = {s: data.inputs.get(n) or data.outputs[n] for n, s in data.sources.items() if n not in data.cameras}
    try:
        columns = _read(data_files(meta), [*vectors, "index", "episode_index", "frame_index", "timestamp"])
    except (OSError, pa.ArrowException, KeyError) as error:
        return [Finding(f"the dataset's data files cannot be read: {first_line(error)}; fetch the dataset again")]
    if len(columns["index"]) != meta.total_frames:
        return [
            Finding(
                f"the dataset's data files hold {len(columns['index'])} frames, its metadata says {meta.total_frames}; "
                "fetch or record the dataset again"
            )
        ]
    findings = _order_faults(meta, columns)
    used = np.isin(columns["episode_index"], episodes)
    for name, feature in vectors.items():
        values = _vector(columns[name], feature.shape[0])
        if values is None:
            findings.append(
                Finding(f"'{name}' does not have {feature.shape[0]} values in every frame; record the dataset again")
            )
            continue
        findings += _value_faults(name, values, columns, used)
        if used.all() and not findings:
            state = _state_mean(data, columns) if name == data.sources.get(ACTION) else None
            findings += _statistics_faults(name, values, meta.stats or {}, state)
    if meta.video_keys:
        findings += _time_faults(columns, used, meta.fps, tolerance_s)
    return findings


def _read(files: Sequence[Path], names: list[str]) -> dict[str, Any]:
    parts = [pq.read_table(file, columns=names) for file in files]
    # In the files' own order: LeRobot takes a frame by its row.
    table = pa.concat_tables(parts).combine_chunks()
    return {name: _column(table[name]) for name in names}


def _column(column: Any) -> Any:
    """A NumPy array for a column of numbers; the list column as it is for one of vectors."""
    column = column.combine_chunks()
    return column if pa.types.is_nested(column.type) else column.to_numpy(zero_copy_only=False)


def _vector(column: Any, width: int) -> NDArray[Any] | None:
    """Values [frames, width]; None if some frames have another number."""
    if isinstance(column, np.ndarray):
        return column[:, None] if width == 1 else None
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, width) if len(values) == width * len(column) else None


def _order_faults(meta: LeRobotDatasetMetadata, columns: dict[str, Any]) -> list[Finding]:
    lengths = np.asarray(meta.episodes["length"])
    expected = np.repeat(np.arange(len(lengths)), lengths)
    steps = np.concatenate([np.arange(length) for length in lengths]) if len(lengths) else np.empty(0)
    for name, wanted in (("index", np.arange(len(expected))), ("episode_index", expected), ("frame_index", steps)):
        if not np.array_equal(columns[name], wanted):
            return [Finding(f"the dataset's '{name}' is not what its list of episodes says; fetch or record it again")]
    return []


def _value_faults(name: str, values: NDArray[Any], columns: dict[str, Any], used: NDArray[Any]) -> list[Finding]:
    bad = used & ~np.isfinite(values.astype(np.float64)).all(1)
    if not bad.any():
        return []
    frame = int(bad.argmax())
    episode = int(columns["episode_index"][frame])
    return [
        Finding(
            f"'{name}' holds NaN or infinity in {int(bad.sum())} frames, first in frame {frame} of episode {episode}; "
            "repair it, leave the episode out with fit --data.episodes, or remove it with: lerobot-edit-dataset "
            f"--operation.type delete_episodes --operation.episode_indices '[{episode}]'"
        )
    ]


def _state_mean(data: DatasetFeatures, columns: dict[str, Any]) -> NDArray[Any] | None:
    source = data.sources.get(OBS_STATE)
    if source is None or data.state is None or data.action is None or data.state.shape[0] < data.action.shape[0]:
        return None
    values = _vector(columns[source], data.state.shape[0])
    return None if values is None else values[:, : data.action.shape[0]].mean(0, dtype=np.float64)


def _statistics_faults(
    name: str, values: NDArray[Any], statistics: dict[str, Any], state: NDArray[Any] | None
) -> list[Finding]:
    """Whether statistics are those of the values, or of the values relative to a state of this mean."""
    said = statistics.get(name, {})
    if "mean" not in said or "std" not in said:
        return []
    mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    told = {kind: np.asarray(said[kind], np.float64).reshape(-1) for kind in ("mean", "std")}
    least = STILL * np.maximum(np.abs(mean), 1)
    moves, ratio = std > least, told["std"] / np.maximum(std, least)
    far = np.abs(told["mean"] - mean) > np.maximum(DRIFT * std, least)
    wide = moves & ((ratio > SPREAD) | (ratio < 1 / SPREAD))
    if state is not None:
        # `check_relative` knows which of the two the policy needs.
        relative = looks_relative(told["mean"], told["std"], mean, state)
        far, wide = far & ~relative, wide & ~relative
    for kind, off, true in (("mean", far, mean), ("std", wide, std)):
        if off.any():
            at = int(off.argmax())
            return [
                warning(
                    f"the dataset's statistics of '{name}' are not those of its data ({kind} {told[kind][at]:.4g} of "
                    f"dimension {at}, the data's {true[at]:.4g}); compute them again with: lerobot-edit-dataset "
                    "--operation.type recompute_stats"
                )
            ]
    return []


def _time_faults(columns: dict[str, Any], used: NDArray[Any], fps: float, tolerance_s: float) -> list[Finding]:
    off = np.where(used, np.abs(columns["timestamp"] - columns["frame_index"] / fps), 0)
    if off.max(initial=0) <= tolerance_s + 1e-6:
        return []
    frame, worst = int(off.argmax()), float(off.max())
    return [
        Finding(
            f"the time stamp of frame {frame} is {1000 * worst:.1f} ms off the video's, expected at most "
            f"{1000 * tolerance_s:.1f} ms; if the videos are right, give fit --data.tolerance_s {1.5 * worst:.4f} "
            "(validate --tolerance_s)"
        )
    ]
