"""Read the messages of LeRobot's `robot_client`, which are pickles, without running what they name.

A pickle can call any function that can be imported. Here it can build plain values, NumPy arrays, and the two classes
that the client sends; whatever else it names is refused before it is looked up.
"""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation

from lerobot_policy_grids.errors import GridsError

HELPERS = "lerobot.async_inference.helpers"
# Names of the same things in NumPy 1 and 2: the robot's machine may have the other.
NUMPY = ("numpy.core", "numpy._core")


class MessageError(GridsError):
    """A message that is not what LeRobot's client sends."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise MessageError(f"it names {module}.{name}, which is not taken from a robot") from None


def _allowed() -> dict[tuple[str, str], Any]:
    """What a message may name. New classes and functions each time: a pickle can change what it was given."""
    # What NumPy's own pickles name; its modules are private.
    reconstruct, scalar = np.empty(0).__reduce__()[0], np.float32(0).__reduce__()[0]
    frombuffer: Any = np.empty(0).__reduce_ex__(5)[0]
    found: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for package in NUMPY:
        found[f"{package}.multiarray", "_reconstruct"] = reconstruct
        found[f"{package}.multiarray", "scalar"] = scalar
        found[f"{package}.numeric", "_frombuffer"] = _fresh(frombuffer)
    for kind in (TimedObservation, RemotePolicyConfig):
        found[HELPERS, kind.__name__] = type(kind.__name__, (_Received,), {})
    return found


class _Received:
    """Whatever attributes a message gives an object of a class that it names."""


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def loads(data: bytes | None) -> Any:
    """A message of LeRobot's client: a `TimedObservation`, or a `RemotePolicyConfig`.

    Raises:
        MessageError: If it is anything else.
    """
    if not data:
        raise MessageError("it ended before it was whole")
    try:
        message = _Unpickler(bytes(data)).load()
    except MessageError:
        raise
    except Exception as error:  # garbage makes the unpickler raise nearly anything
        raise MessageError(f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(message, _Received):
        raise MessageError(f"it is a {type(message).__name__}, which LeRobot's client never sends")
    values = vars(message)
    try:
        return _observation(values) if type(message).__name__ == "TimedObservation" else _instructions(values)
    except (KeyError, TypeError) as error:
        raise MessageError(f"it lacks what LeRobot's client sends ({type(error).__name__}: {error})") from error


def _observation(values: dict[str, Any]) -> TimedObservation:
    timestamp, timestep, observation = values["timestamp"], values["timestep"], values["observation"]
    if not isinstance(timestamp, (int, float)) or not math.isfinite(timestamp):
        raise TypeError("timestamp")
    if not isinstance(timestep, int) or timestep < 0:
        raise TypeError("timestep")
    if not isinstance(observation, dict):
        raise TypeError("observation")
    return TimedObservation(float(timestamp), timestep, observation, bool(values.get("must_go", False)))


def _instructions(values: dict[str, Any]) -> RemotePolicyConfig:
    texts = {name: values[name] for name in ("policy_type", "pretrained_name_or_path", "device")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("a name that is no text")
    features, count, renames = values["lerobot_features"], values["actions_per_chunk"], values.get("rename_map") or {}
    if not isinstance(features, dict) or not isinstance(count, int) or not isinstance(renames, dict):
        raise TypeError("lerobot_features, actions_per_chunk or rename_map")
    return RemotePolicyConfig(lerobot_features=features, actions_per_chunk=count, rename_map=renames, **texts)
