"""The features of a dataset in the names of a policy: renamed, images with their channels first."""

import json
from dataclasses import dataclass
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.utils.constants import ACTION, DEFAULT_FEATURES, OBS_IMAGES, OBS_STATE

from lerobot_policy_grids.errors import DatasetError
from lerobot_policy_grids.families.base import CHANNELS, dimension_names, image_size

from .findings import Finding, warning

# Only what is called so reaches a policy through LeRobot's processors.
OBSERVATION = "observation."
# Other names of actions and states, as in datasets that openpi's tools wrote.
USUAL = {"actions": ACTION, "state": OBS_STATE}


@dataclass(frozen=True)
class DatasetFeatures:
    """What a policy can read of a dataset.

    Attributes:
        cameras: Name -> feature (c, h, w) of each colour camera.
        state: The robot's state; None without one.
        action: The action; None without one.
        names: Policy's name -> names of the dimensions, of state and action where the dataset has them.
        sources: Policy's name -> the dataset's name, of everything above.
        described: Policy's name -> feature as the dataset's metadata has it, of every feature.
        findings: What is left out, and what cannot be read.
    """

    cameras: dict[str, PolicyFeature]
    state: PolicyFeature | None
    action: PolicyFeature | None
    names: dict[str, list[str]]
    sources: dict[str, str]
    described: dict[str, Any]
    findings: tuple[Finding, ...]

    @property
    def listed(self) -> str:
        """The features that this dataset has and not every dataset, for messages."""
        return ", ".join(sorted(name for name in self.described if name not in DEFAULT_FEATURES))

    @property
    def inputs(self) -> dict[str, PolicyFeature]:
        """LeRobot's input features."""
        return self.cameras | ({} if self.state is None else {OBS_STATE: self.state})

    @property
    def outputs(self) -> dict[str, PolicyFeature]:
        """LeRobot's output features."""
        return {} if self.action is None else {ACTION: self.action}


def read_features(meta: LeRobotDatasetMetadata, rename_map: dict[str, str] | None = None) -> DatasetFeatures:
    """Sort the features of a dataset.

    Args:
        meta: The dataset's metadata.
        rename_map: Dataset feature names to the policy's.

    Raises:
        DatasetError: If the map names a feature that does not exist, gives two features one name, or renames twice.
    """
    renamed = _renamed(meta.features, rename_map or {})
    findings: list[Finding] = []
    cameras, state, action, unread, depth = {}, None, None, [], []
    sources, names = {}, {}
    for name, (source, feature) in renamed.items():
        shape = tuple(feature["shape"])
        if feature["dtype"] in ("image", "video"):
            if source in meta.depth_keys:
                depth.append(name)
            elif name.startswith(OBSERVATION):
                findings += _image_faults(name, shape)
                cameras[name] = PolicyFeature(FeatureType.VISUAL, _channels_first(shape, feature.get("names")))
                sources[name] = source
        elif name in (OBS_STATE, ACTION):
            kind = FeatureType.STATE if name == OBS_STATE else FeatureType.ACTION
            read = PolicyFeature(kind, shape)
            findings += _vector_faults(name, shape, feature["dtype"])
            state, action = (read, action) if name == OBS_STATE else (state, read)
            sources[name] = source
            listed = dimension_names(feature)
            if listed is not None:
                names[name] = listed
        elif name.startswith((OBSERVATION, ACTION)):
            unread.append(name)
    foreign = _foreign(renamed)
    if foreign and (not cameras or action is None):
        findings.append(_rename_advice(foreign))
    for left_out, why in (
        (depth, "a depth map, and no supported policy reads depth"),
        (unread, "not read by policies"),
    ):
        if left_out:
            findings.append(warning(f"{', '.join(left_out)}: {why}; left out"))
    described = {name: feature for name, (_, feature) in renamed.items()}
    return DatasetFeatures(cameras, state, action, names, sources, described, tuple(findings))


def is_foreign(name: str) -> bool:
    """Whether LeRobot's processors would not hand a feature of this name to a policy."""
    return not name.startswith((OBSERVATION, ACTION)) or name in USUAL


def _renamed(features: dict[str, Any], rename_map: dict[str, str]) -> dict[str, tuple[str, Any]]:
    """Policy's name -> (dataset's name, feature)."""
    unknown = [name for name in rename_map if name not in features]
    if unknown:
        raise DatasetError(f"rename_map names {', '.join(unknown)}; the dataset has {', '.join(features)}")
    renamed = [rename_map.get(name, name) for name in features]
    twice = sorted({name for name in renamed if renamed.count(name) > 1})
    if twice:
        raise DatasetError(
            f"rename_map gives {', '.join(twice)} to two features of the dataset; give each its own name"
        )
    for old, new in rename_map.items():
        # The loader renames these, and LeRobot's pre-processor all others, after it.
        if is_foreign(old) and new in rename_map:
            raise DatasetError(
                f"rename_map gives '{old}' the name '{new}', and that name to another feature; rename it in the dataset"
            )
    return dict(zip(renamed, features.items(), strict=True))


def _channels_first(shape: tuple[int, ...], names: Any) -> tuple[int, ...]:
    """LeRobot hands out images [c, h, w] whatever the shape in the metadata says."""
    if len(shape) != 3:
        return shape
    named = isinstance(names, list) and len(names) == 3
    if named and str(names[0]).startswith("channel"):
        return shape
    if named and str(names[2]).startswith("channel"):
        return (shape[2], *shape[:2])
    channels = shape[0] if shape[0] in CHANNELS else shape[-1]
    return (channels, *image_size(shape))


def _image_faults(name: str, shape: tuple[int, ...]) -> list[Finding]:
    if len(shape) == 3 and 3 in (shape[0], shape[-1]):
        return []
    return [Finding(f"camera '{name}' has images of shape {shape}, expected height, width and 3 colours; leave it out")]


def _vector_faults(name: str, shape: tuple[int, ...], dtype: str) -> list[Finding]:
    if len(shape) == 1 and dtype.startswith(("float", "int", "uint", "bool")):
        return []
    return [Finding(f"'{name}' has shape {shape} of {dtype}, expected one axis of numbers; store it as a vector")]


def _foreign(renamed: dict[str, tuple[str, Any]]) -> dict[str, str]:
    """Features that no policy gets under their names, and names under which it would."""
    proposed = {}
    for name, (source, feature) in renamed.items():
        if feature["dtype"] in ("image", "video") and not name.startswith(OBSERVATION):
            proposed[source] = f"{OBS_IMAGES}.{name}"
        elif name in USUAL and USUAL[name] not in renamed:
            proposed[source] = USUAL[name]
    return proposed


def _rename_advice(foreign: dict[str, str]) -> Finding:
    return Finding(
        f"{', '.join(foreign)}: LeRobot hands a policy only '{ACTION}' and features that begin with '{OBSERVATION}'; "
        f"give --rename_map '{json.dumps(foreign)}'"
    )
