"""Statistics by which processors normalise: a step without them hands raw numbers on, without a word."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .files import POSTPROCESSOR_FILE, PREPROCESSOR_FILE, open_tensors, read_json

# LeRobot's mode of normalisation -> the statistics that it uses.
USED = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
# No robot's joint or speed is larger, in any unit.
LARGEST = 1e9
STEPS = ("normalizer_processor", "unnormalizer_processor")
# A range smaller than this share of the values is rounding in float32.
ROUNDING = 1e-5


def settle_constants(statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Give every dimension that never changed exact statistics; all others keep theirs.

    LeRobot sums in float32, so the mean of a joint that was always at 13.37 is a little off, and its standard deviation
    is 0 or noise. Then the normalised value of the same 13.37 is in the hundreds, or the joint is sent that noise.

    Args:
        statistics: Name -> kind -> values.
    """
    return {name: _settle(kinds) for name, kinds in statistics.items()}


def _settle(kinds: Mapping[str, Any]) -> dict[str, Any]:
    if "min" not in kinds or "max" not in kinds or np.ndim(kinds["min"]) != 1:
        return dict(kinds)
    low, high = (np.asarray(kinds[kind], np.float64) for kind in ("min", "max"))
    with np.errstate(invalid="ignore"):
        still = high - low <= ROUNDING * np.maximum(np.abs(low), np.abs(high))
        exact = {"mean": (low + high) / 2, "std": (high - low) / 2, "q01": low, "q10": low, "q90": high, "q99": high}
    return {kind: np.where(still, exact[kind], value) if kind in exact else value for kind, value in kinds.items()}


def find_fault(
    features: Mapping[str, tuple[str, tuple[int, ...]]],
    modes: Mapping[str, str],
    statistics: Mapping[str, Mapping[str, Tensor]],
) -> str | None:
    """The first fault of a normalising step, in words; None if it has none.

    Args:
        features: Name -> (type, shape) of what it normalises.
        modes: Type -> LeRobot's mode of normalisation.
        statistics: Name -> kind -> values.
    """
    for name, (kind, shape) in features.items():
        for used in USED.get(modes.get(kind, ""), ()):
            values = statistics.get(name, {}).get(used)
            if values is None:
                return f"has no '{used}' of '{name}', which would stay as it is"
            values = torch.as_tensor(values).float()
            if not _plausible(values):
                return f"has a '{used}' of '{name}' that is not finite, or beyond {LARGEST:.0e}"
            # Images have one value per channel.
            if len(shape) == 1 and values.numel() not in (1, shape[0]):
                return f"has a '{used}' of '{name}' with {values.numel()} values, expected {shape[0]}"
    return None


def advise(fault: str) -> str:
    """What to do about a fault in a dataset's statistics."""
    # LeRobot's own commands add quantiles to a dataset that was recorded without, and compute statistics again.
    if "'q" in fault:
        return "add them with: python -m lerobot.scripts.augment_dataset_quantile_stats --repo-id=USER/DATASET"
    return "compute them again with: lerobot-edit-dataset --repo_id USER/DATASET --operation.type recompute_stats"


def _plausible(values: Tensor) -> bool:
    return bool(values.isfinite().all() and (values.abs() <= LARGEST).all())


def check_statistics(folder: Path, *, complete: bool = True) -> None:
    """Raise `CheckpointError` unless both processors of a checkpoint can normalise what they are to normalise.

    Args:
        folder: The checkpoint.
        complete: Whether no statistics may be missing. A dense policy may lack them: training it makes new ones.
    """
    for name in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE):
        for step in read_json(folder / name).get("steps", []):
            if isinstance(step, dict) and step.get("registry_name") in STEPS:
                try:
                    fault = _fault_of(folder, step, complete)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    fault = f"has options that cannot be read ({error!r})"
                if fault is not None:
                    raise CheckpointError(
                        f"{folder / name}: '{step['registry_name']}' {fault}; use a checkpoint that was trained on "
                        "your robot's data, or train this one on it with lerobot-grids fit"
                    )


def _fault_of(folder: Path, step: dict[str, Any], complete: bool) -> str | None:
    config = step.get("config", {})
    features = {
        name: (feature["type"], tuple(feature["shape"])) for name, feature in (config.get("features") or {}).items()
    }
    statistics: dict[str, dict[str, Tensor]] = {}
    if "state_file" in step:
        with open_tensors(folder / step["state_file"], "copy the checkpoint again") as file:
            for key in file.keys():  # noqa: SIM118 (no dictionary)
                name, _, kind = key.rpartition(".")
                statistics.setdefault(name, {})[kind] = file.get_tensor(key)
    return find_fault(features, config.get("norm_map") or {}, statistics) if complete else _wild_value(statistics)


def _wild_value(statistics: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The first fault of a value that some mode uses, of any feature."""
    used = {kind for kinds in USED.values() for kind in kinds}
    for name, kinds in statistics.items():
        for kind in sorted(used & kinds.keys()):
            if not _plausible(kinds[kind].float()):
                return f"has a '{kind}' of '{name}' that is not finite, or beyond {LARGEST:.0e}"
    return None
