"""Numbers that no robot is sent and no policy is trained on: NaN and infinity."""

from typing import Any

import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from .errors import DatasetError, GridsError

# Where a frame of a batch comes from.
PLACES = {"index": "frame", "episode_index": "episode"}


def require_finite_action(action: Any, state: Any) -> Any:
    """The action, if it and the state hold numbers.

    A policy that writes its state into the instruction gives finite actions for NaN, and LeRobot adds the state to
    relative actions after the policy.

    Raises:
        GridsError: If one of them holds NaN or infinity.
    """
    # A newer LeRobot may return an object that holds the action.
    values = getattr(action, "action", action)
    if _has_bad_numbers(state):
        raise GridsError(f"'{OBS_STATE}' holds NaN or infinity; check what the robot reads, and its normalisation")
    if _has_bad_numbers(values):
        raise GridsError("the policy's action holds NaN or infinity; check the observation and its normalisation")
    return action


def _has_bad_numbers(values: Any) -> bool:
    # A meta tensor, on which costs are counted, has no values to check.
    return isinstance(values, Tensor) and not values.is_meta and not bool(torch.isfinite(values).all())


def require_finite_batch(batch: dict[str, Any]) -> None:
    """Refuse a batch to train on whose states or actions hold NaN or infinity.

    Raises:
        DatasetError: It names the frame.
    """
    # Families that write numbers as tokens would make words of NaN, and their loss would be finite.
    values = {name: batch[name] for name in (OBS_STATE, ACTION) if isinstance(batch.get(name), Tensor)}
    finite = {name: torch.isfinite(value).flatten(1).all(1) for name, value in values.items() if not value.is_meta}
    # One number for the device to wait for.
    if not finite or torch.stack(list(finite.values())).all():
        return
    name, good = next((name, good) for name, good in finite.items() if not good.all())
    row = int((~good).int().argmax())
    places = [f"{what} {int(batch[key][row])}" for key, what in PLACES.items() if key in batch]
    place = f" at {' of '.join(places)}" if places else ""
    raise DatasetError(f"'{name}' holds NaN or infinity{place}; repair or remove that episode, and continue")
