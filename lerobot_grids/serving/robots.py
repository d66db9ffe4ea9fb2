"""Does a robot that connects fit the policy that is served? And a robot that is made up, to warm up with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE

from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import GridsError, SimulationError
from lerobot_policy_grids.families.base import EMPTY_CAMERA, image_size

from ..evaluation.tampering import mean_state
from ..policies import LoadedPolicy

# More pixels than any camera of a robot has, and joints than any robot.
MOST_PIXELS, MOST_JOINTS = 10**8, 1000
# How much wider or higher a picture may be than in training before that is worth a line.
STRETCHED = 1.02


class RobotError(GridsError):
    """A robot that does not fit the policy."""


@dataclass(frozen=True)
class RobotFeatures:
    """What a robot sends, in LeRobot's names.

    Attributes:
        features: Name -> description, of what the policy reads.
        images: Camera of the robot -> what the policy takes its picture for, (3, h, w).
        warnings: What works and may surprise.
    """

    features: dict[str, Any]
    images: dict[str, PolicyFeature]
    warnings: tuple[str, ...] = ()


def match_robot(loaded: LoadedPolicy, given: Mapping[str, Any]) -> RobotFeatures:
    """Match what a robot sends with what the policy reads.

    Args:
        loaded: The policy with its processors.
        given: Name -> {"dtype", "shape", "names"}, as LeRobot's client describes its robot.

    Raises:
        RobotError: If a camera or the state does not fit.
    """
    config, renames = loaded.policy.config, loaded.renames
    robot = {str(name): _checked(str(name), feature) for name, feature in given.items()}
    wanted = {name: f for name, f in config.image_features.items() if EMPTY_CAMERA not in name}
    cameras = {renames.get(name, name): name for name in robot if name.startswith(OBS_IMAGES)}
    missing, unused = [n for n in wanted if n not in cameras], [n for n in cameras if n not in wanted]
    have = ", ".join(name.removeprefix(f"{OBS_IMAGES}.") for name in cameras.values()) or "none"
    if missing:
        called = ", ".join(name.removeprefix(f"{OBS_IMAGES}.") for name in wanted)
        raise RobotError(
            f"the policy looks through cameras {called}; the robot has {have}. Name the robot's cameras so in "
            f'--robot.cameras, or start serve with --rename_map \'{{"{OBS_IMAGES}.YOURS": "{missing[0]}"}}\''
        )
    warnings = [f"the policy does not look through {name}" for name in unused]
    images = {}
    for name, feature in wanted.items():
        height, width = image_size(feature.shape)
        source = cameras[name]
        images[source] = PolicyFeature(FeatureType.VISUAL, (3, height, width))
        rows, columns = robot[source]["shape"][:2]
        if not 1 / STRETCHED < (columns / rows) / (width / height) < STRETCHED:
            warnings.append(
                f"camera {source} sends {columns} x {rows} pixels and the policy learnt from {width} x {height}: "
                "LeRobot stretches the picture; set the camera to the shape of the training data"
            )
    used = {name: robot[name] for name in images}
    if OBS_STATE in robot:
        used[OBS_STATE] = robot[OBS_STATE]
    _check_state(config, robot.get(OBS_STATE))
    return RobotFeatures(used, images, tuple(warnings))


def _checked(name: str, feature: Any) -> dict[str, Any]:
    """A feature, if it has the shape of one."""
    shape = feature.get("shape") if isinstance(feature, dict) else None
    if not isinstance(shape, (tuple, list)) or not all(isinstance(side, int) and side > 0 for side in shape):
        raise RobotError(f"the robot describes {name} as {str(feature)[:80]}, expected a shape of positive numbers")
    names = feature.get("names")
    if name.startswith(OBS_IMAGES):
        if len(shape) != 3 or shape[2] != 3 or shape[0] * shape[1] > MOST_PIXELS:
            raise RobotError(
                f"the robot's camera {name} has images of shape {tuple(shape)}, expected (height, width, 3)"
            )
        return {"dtype": "image", "shape": tuple(shape), "names": names}
    if len(shape) != 1 or shape[0] > MOST_JOINTS or not isinstance(names, list) or len(names) != shape[0]:
        raise RobotError(f"the robot's {name} has shape {tuple(shape)}, expected one axis with a name for each number")
    return {"dtype": "float32", "shape": tuple(shape), "names": [str(part) for part in names]}


def _check_state(config: Any, state: dict[str, Any] | None) -> None:
    trained = config.robot_state_feature
    if trained is not None and state is None:
        raise RobotError(
            f"the policy reads '{OBS_STATE}' with {trained.shape[0]} joints, which the robot does not send"
        )
    if state is None:
        return
    names = state["names"]
    if trained is not None and trained.shape[0] != len(names):
        raise RobotError(
            f"the policy was trained with {trained.shape[0]} joints, the robot has {len(names)} ({', '.join(names)}); "
            "use the robot of the training data"
        )
    # LeRobot's client sends the numbers of an action to its motors by their position.
    before = getattr(base_config(config), "action_feature_names", None)
    if before and sorted(before) == sorted(names) and list(before) != names:
        raise RobotError(
            f"the policy has the joints {', '.join(before)}, the robot has {', '.join(names)}, in another order: each "
            "would be sent another one's value; use the robot of the training data"
        )


def require_observation(observation: Mapping[str, Any], robot: RobotFeatures) -> None:
    """Refuse an observation that is not what its robot described.

    Raises:
        RobotError: If a camera or a joint is missing, of another shape, or no number.
    """
    for name, feature in robot.features.items():
        if name in robot.images:
            key = name.removeprefix(f"{OBS_IMAGES}.")
            picture = observation.get(key)
            if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.shape != feature["shape"]:
                seen = getattr(picture, "shape", type(picture).__name__)
                raise RobotError(f"camera {key} sent {seen}, expected uint8 pixels of shape {feature['shape']}")
            continue
        for joint in feature["names"]:
            value = observation.get(joint)
            if not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
                raise RobotError(f"joint {joint} is {str(value)[:40]}, expected a finite number")


def mock_robot(loaded: LoadedPolicy, task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Features, observation) of a robot that fits a policy: noise for pictures, the mean state of its training.

    Args:
        loaded: The policy with its processors.
        task: The instruction.

    Raises:
        RobotError: If a camera of the policy has a name that LeRobot gives to no robot's camera.
    """
    config = loaded.policy.config
    sources = {new: old for old, new in loaded.renames.items()}
    features: dict[str, Any] = {}
    observation: dict[str, Any] = {"task": task}
    random = np.random.default_rng(0)
    for name, feature in config.image_features.items():
        if EMPTY_CAMERA in name:
            continue
        key = sources.get(name, name)
        if not key.startswith(f"{OBS_IMAGES}."):
            raise RobotError(
                f"the policy looks through '{key}', and LeRobot calls a robot's cameras '{OBS_IMAGES}.NAME'; give "
                f'--rename_map \'{{"{OBS_IMAGES}.NAME": "{name}"}}\''
            )
        shape = (*image_size(feature.shape), 3)
        features[key] = {"dtype": "image", "shape": shape, "names": ["height", "width", "channels"]}
        observation[key.removeprefix(f"{OBS_IMAGES}.")] = random.integers(0, 256, shape, np.uint8)
    if config.robot_state_feature is not None:
        count = config.robot_state_feature.shape[0]
        names = action_names(loaded, count)
        features[OBS_STATE] = {"dtype": "float32", "shape": (count,), "names": names}
        try:
            mean = mean_state(loaded.preprocessor).tolist()
        except SimulationError:
            mean = [0.0] * count
        observation |= dict(zip(names, mean, strict=True))
    return features, observation


def action_names(loaded: LoadedPolicy, count: int) -> list[str]:
    """Names of joints, by their number where the policy does not know them."""
    known = getattr(base_config(loaded.policy.config), "action_feature_names", None) or []
    return list(known) if len(known) == count else [f"joint_{number}.pos" for number in range(1, count + 1)]
