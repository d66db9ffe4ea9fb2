"""The frames of one episode of a dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Subset

from lerobot_policy_grids.errors import DatasetError

from ..console import report
from ..data import load_metadata
from ..data.frames import Frames, check_decoder, open_dataset, read_columns
from ..preflight.features import read_features
from ..preflight.robot import check_acting


@dataclass(frozen=True)
class Episode:
    """An episode, of which every n-th frame is shown.

    Attributes:
        dataset: LeRobot's dataset, with this episode alone.
        number: The episode.
        frames: Its frames, as a policy wants them, those that are shown.
        fps: Frames per second of what is shown.
    """

    dataset: Any
    number: int
    frames: Subset[dict[str, Any]]
    fps: float

    def batches(self, size: int) -> Iterator[dict[str, Any]]:
        """Batches of the frames that are shown, in order."""
        yield from DataLoader(self.frames, batch_size=size)

    @property
    def task(self) -> str:
        """Its instruction, of the first frame."""
        return str(self.frames[0]["task"])


def open_episode(
    source: str,
    config: Any,
    dataset: str,
    number: int = 0,
    *,
    every: int = 1,
    most: int | None = None,
    rename_map: dict[str, str] | None = None,
    tolerance_s: float = 1e-4,
    video_backend: str | None = None,
) -> Episode:
    """Open an episode for a policy; only its files are fetched of a dataset on the Hub.

    Args:
        source: What the user calls the policy.
        config: The policy's configuration.
        dataset: Folder of a LeRobotDataset, or its id on the Hub.
        number: The episode, from 0.
        every: Show every n-th frame.
        most: Show at most so many frames, the first ones.
        rename_map: Dataset feature names to the policy's.
        tolerance_s: How far in seconds a video's frame may be from its time stamp.
        video_backend: "torchcodec" or "pyav"; None takes the one that works here.

    Raises:
        DatasetError: If it does not exist, or does not fit the policy.
    """
    meta = load_metadata(dataset)
    if not 0 <= number < meta.total_episodes:
        raise DatasetError(
            f"episode {number}; dataset {dataset} has the episodes 0 .. {meta.total_episodes - 1}, give one of them"
        )
    known = {old: new for old, new in (rename_map or {}).items() if old in meta.features}
    features = read_features(meta, known)
    report([*check_decoder(meta, video_backend), *check_acting(source, config, features)])
    opened = open_dataset(
        meta, features, config, episodes=[number], tolerance_s=tolerance_s, video_backend=video_backend
    )
    frames = Frames(opened, read_columns(features, config))
    shown = list(range(0, len(frames), every))[:most]
    return Episode(opened, number, Subset(frames, shown), meta.fps / every)
