"""The frames of a LeRobotDataset as a policy wants them: its features under its names, and errors in one line."""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, DEFAULT_FEATURES, OBS_STATE
from lerobot.utils.import_utils import get_safe_default_video_backend
from torch.utils.data import Dataset

from lerobot_policy_grids.errors import DatasetError, causes, first_line

from ..preflight import Finding
from ..preflight.features import DatasetFeatures, is_foreign
from ..preflight.findings import warning
from .metadata import PLACES, POSITIONS

# Of every LeRobotDataset.
COUNTERS = ("index", "episode_index", "frame_index", "timestamp", "task_index")


def open_dataset(
    meta: LeRobotDatasetMetadata,
    features: DatasetFeatures,
    config: PreTrainedConfig,
    *,
    revision: str | None = None,
    episodes: list[int] | None = None,
    tolerance_s: float = 1e-4,
    video_backend: str | None = None,
) -> LeRobotDataset:
    """Open a dataset with the delta timestamps of a policy; it is fetched if it is on the Hub.

    Args:
        meta: Its metadata.
        features: Its features.
        config: The policy's configuration.
        revision: Hub revision.
        episodes: Open, and fetch, these episodes alone; None for all. Their frames are counted from 0 on.
        tolerance_s: How far in seconds a video's frame may be from its time stamp.
        video_backend: "torchcodec" or "pyav"; None takes the one that works here.

    Raises:
        DatasetError: If it cannot be opened.
    """
    # Under the policy's names, as LeRobot looks for them, and back.
    described: Any = SimpleNamespace(features=features.described, fps=meta.fps)
    deltas = resolve_delta_timestamps(config, described) or {}
    try:
        return LeRobotDataset(
            meta.repo_id,
            root=meta.root,
            revision=revision,
            episodes=episodes,
            delta_timestamps={features.sources.get(name, name): steps for name, steps in deltas.items()} or None,
            tolerance_s=tolerance_s,
            video_backend=video_backend or default_video_backend(),
            return_uint8=True,
        )
    except Exception as error:  # LeRobot raises many types of errors here
        # Where a file is damaged, only the first cause says what is wrong with it.
        what, why = first_line(error), first_line([*causes(error)][-1])
        reason = what if what == why else f"{what} ({why}); if a file is damaged, copy the dataset again"
        raise DatasetError(f"dataset {meta.repo_id} cannot be opened: {reason}") from error


def default_video_backend() -> str:
    """LeRobot's choice, without the many lines that it logs where FFmpeg's libraries are missing."""
    logger = logging.getLogger("lerobot.utils.import_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        backend: str = get_safe_default_video_backend()
    finally:
        logger.setLevel(before)
    return backend


def check_decoder(meta: LeRobotDatasetMetadata, video_backend: str | None) -> list[Finding]:
    """Warn if the faster decoder of videos is installed and does not work."""
    if not meta.video_keys or video_backend or not find_spec("torchcodec") or default_video_backend() == "torchcodec":
        return []
    line = "torchcodec cannot be loaded, mostly for want of FFmpeg's libraries; videos are decoded by pyav, slower"
    return [warning(line)]


def read_columns(features: DatasetFeatures, config: PreTrainedConfig) -> dict[str, str]:
    """Dataset's name -> name in a batch, of every column that training with a policy needs.

    LeRobot's pre-processor renames observations itself, as it does on the robot; it drops what is called otherwise, so
    that is renamed here.

    Raises:
        DatasetError: If the dataset has no column for what the policy reads.
    """
    wanted = [name for name in (OBS_STATE, ACTION) if name in {**config.input_features, **config.output_features}]
    missing = [name for name in wanted if name not in features.sources]
    if missing:
        raise DatasetError(f"the dataset has no '{missing[0]}'; it has {features.listed}; give --rename_map")
    # A configuration without features takes the dataset's.
    cameras = [name for name in features.cameras if name in config.image_features or not config.input_features]
    read = [*cameras, *(name for name in features.sources if name not in features.cameras)]
    sources = {features.sources[name]: name for name in read}
    columns = {source: name if is_foreign(source) else source for source, name in sources.items()}
    kept = [name for name in (*COUNTERS, POSITIONS, PLACES) if name in features.described]
    return columns | dict(zip(kept, kept, strict=True))


def is_scalar(meta: LeRobotDatasetMetadata, source: str) -> bool:
    """Whether LeRobot stores a vector of one dimension without its axis, which policies expect."""
    return source not in DEFAULT_FEATURES and tuple(meta.features[source]["shape"]) == (1,)


class FrameError(DatasetError):
    """A frame cannot be read."""

    def __init__(self, message: str) -> None:
        # From another process, torch raises it anew with that process's traceback in front.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2])


class Frames(Dataset[dict[str, Any]]):
    """Items of a LeRobotDataset with some of its columns, each frame and its delta timestamps.

    `frames[index]` raises `FrameError` if LeRobot cannot read it.

    Args:
        dataset: The dataset.
        columns: Dataset's name -> name in an item.
    """

    def __init__(self, dataset: LeRobotDataset, columns: Mapping[str, str]) -> None:
        self.dataset = dataset
        padded = {f"{source}_is_pad": f"{name}_is_pad" for source, name in columns.items()}
        self.names = {**columns, **padded, "task": "task"}
        self.scalars = {source for source in columns if is_scalar(dataset.meta, source)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            item = self.dataset[index]
        except Exception as error:  # LeRobot and its video decoders raise many types of errors here
            raise FrameError(
                f"frame {index} of dataset {self.dataset.repo_id} cannot be read: {first_line(error)}; repair it, give "
                "--data.tolerance_s where a time stamp is off, or --data.video_backend pyav"
            ) from error
        for source in self.scalars:
            item[source] = item[source].unsqueeze(-1)
        return {name: item[source] for source, name in self.names.items() if source in item}
