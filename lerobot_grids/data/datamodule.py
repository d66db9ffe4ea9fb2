"""LeRobotDataModule: a LeRobotDataset, split by episodes into training and validation data."""

import os
import signal
from collections.abc import Callable
from typing import Any

import lightning
from lerobot.configs import PreTrainedConfig
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from lerobot_policy_grids.errors import DatasetError, GridsError

from ..preflight import Finding, refuse_errors
from ..preflight.features import read_features
from ..preflight.values import check_values, data_files
from .frame_cache import FrameCache, fits_in_memory
from .frame_order import FrameOrder
from .frames import Frames, check_decoder, open_dataset, read_columns
from .metadata import load_metadata


class LeRobotDataModule(lightning.LightningDataModule):
    """Demonstrations for training and validation; validation uses whole held-out episodes.

    Args:
        dataset: Folder of a LeRobotDataset, or its id on the Hub.
        revision: Hub revision of the dataset.
        batch_size: Frames per step and device. None takes 32; the command line uses the family's recipe.
        val_fraction: Share of the episodes held out, spread evenly over the recording.
        max_val_frames: Validate on at most this many of the held-out frames, spread evenly.
        num_workers: Number of processes that load frames. -1 takes 0 for cached frames, else one per core up to 4.
        episodes: Train and validate on these episodes alone. Defaults to all.
        rename_map: Names of dataset features -> the policy's names, where they differ.
        tolerance_s: How far in seconds a video's frame may be from its time stamp, as in lerobot-train.
        video_backend: Decoder of videos, "torchcodec" or "pyav". Defaults to the one that works here.
        cache: Whether frames stored as images are decoded once into memory: "auto" (if they need less than a quarter of
            the memory) or "never".
        seed: Seed of the order of the frames.

    Raises:
        DatasetError: If the dataset is missing or unreadable, or its numbers are not what its metadata says.

    Attributes:
        findings: What may surprise in the dataset.
    """

    def __init__(
        self,
        dataset: str,
        revision: str | None = None,
        batch_size: int | None = None,
        val_fraction: float = 0.1,
        max_val_frames: int = 512,
        num_workers: int = -1,
        episodes: list[int] | None = None,
        rename_map: dict[str, str] | None = None,
        tolerance_s: float = 1e-4,
        video_backend: str | None = None,
        cache: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if cache not in ("auto", "never"):
            raise DatasetError(f"cache={cache} is unknown; choose 'auto' or 'never'")
        if not 0 <= val_fraction < 1:
            raise DatasetError(f"val_fraction={val_fraction}; choose a share of the episodes from 0 to below 1")
        if max_val_frames < 1:
            raise DatasetError(f"max_val_frames={max_val_frames}; give at least 1, or val_fraction=0 for no validation")
        if tolerance_s <= 0:
            raise DatasetError(f"tolerance_s={tolerance_s}; give seconds above 0, such as 0.001")
        self.meta = load_metadata(dataset, revision)
        self.revision = revision
        self.episodes = _chosen(episodes, self.meta.total_episodes)
        self.rename_map = rename_map
        self.features = read_features(self.meta, rename_map)
        self.tolerance_s = tolerance_s
        self.video_backend = video_backend
        self.batch_size = 32 if batch_size is None else batch_size
        self.val_fraction = val_fraction
        self.max_val_frames = max_val_frames
        self.num_workers = num_workers
        self.cache = cache
        self.seed = seed
        self.train_dataset: Dataset[Any] | None = None
        self.val_dataset: Dataset[Any] | None = None
        self.findings: list[Finding] = []
        self._checked = False
        # A dataset on the Hub is fetched and checked later.
        if data_files(self.meta):
            self._check()

    def _check(self) -> None:
        if not self._checked:
            findings = check_values(self.meta, self.features, self.episodes, self.tolerance_s)
            refuse_errors(findings)
            self.findings += [*findings, *check_decoder(self.meta, self.video_backend)]
        self._checked = True

    @property
    def identity(self) -> dict[str, Any]:
        """The options that decide which frames a step gets, except the number of processes."""
        return {
            "frames": self.meta.total_frames,
            "revision": self.revision,
            "episodes": self.episodes if len(self.episodes) < self.meta.total_episodes else None,
            "batch_size": self.batch_size,
            "val_fraction": self.val_fraction,
            "seed": self.seed,
        }

    def split(self) -> tuple[list[int], list[int]]:
        """Episode indices for (training, validation). With fewer than two episodes nothing is held out."""
        episodes = self.episodes
        held_out = round(self.val_fraction * len(episodes))
        if self.val_fraction > 0:
            # At least one for each.
            held_out = min(max(held_out, 1), len(episodes) - 1)
        # Spread evenly, so that every task and every session is represented.
        val = {(2 * i + 1) * len(episodes) // (2 * held_out) for i in range(held_out)} if held_out else set()
        return (
            [e for place, e in enumerate(episodes) if place not in val],
            [e for place, e in enumerate(episodes) if place in val],
        )

    def setup(self, stage: str | None = None) -> None:
        if self.train_dataset is None:
            if self.trainer is None:
                raise RuntimeError("setup needs a trainer, because the module's policy decides which frames are loaded")
            loaded = self.trainer.lightning_module.loaded
            self.load(loaded.policy.config, loaded.renames)

    def load(self, config: PreTrainedConfig, rename_map: dict[str, str] | None = None) -> None:
        """Open the dataset with the delta timestamps of a policy's configuration.

        Args:
            config: The policy's configuration.
            rename_map: Names of dataset features -> the policy's names, where this module was not told.

        Raises:
            DatasetError: If it cannot be opened, does not have what the policy reads, or its numbers are wrong.
        """
        if rename_map and not self.rename_map:
            self.rename_map = rename_map
            self.features, self._checked = read_features(self.meta, rename_map), False
        dataset = open_dataset(
            self.meta,
            self.features,
            config,
            revision=self.revision,
            tolerance_s=self.tolerance_s,
            video_backend=self.video_backend,
        )
        self._check()
        columns = read_columns(self.features, config)
        if self.cache == "auto" and fits_in_memory(self.meta, columns):
            frames: Dataset[Any] = FrameCache(dataset, columns)
        else:
            frames = Frames(dataset, columns)
        train, val = (self._frames_of(episodes) for episodes in self.split())
        stride = max(1, -(-len(val) // self.max_val_frames))
        self.train_dataset, self.val_dataset = Subset(frames, train), Subset(frames, val[::stride])

    def _frames_of(self, episodes: list[int]) -> list[int]:
        table = self.meta.episodes
        spans = zip(table["dataset_from_index"], table["dataset_to_index"], strict=True)
        ranges = {episode: range(start, end) for episode, (start, end) in enumerate(spans)}
        return [frame for episode in episodes for frame in ranges[episode]]

    def train_dataloader(self) -> DataLoader[Any]:
        """Return endless batches; the trainer's `max_steps` ends the run."""
        if self.trainer is None:
            return self._loader(self.train_dataset, batch_sampler=self._order(0, 1, int))
        if self.trainer.max_steps < 1:
            raise GridsError("the training data is endless, so the trainer needs max_steps; set it")
        return self._loader(
            self.train_dataset,
            batch_sampler=self._order(self.trainer.global_rank, self.trainer.world_size, self._batches_done),
        )

    def _order(self, rank: int, world_size: int, first_batch: Callable[[], int]) -> FrameOrder:
        frames = len(self.train_dataset)  # type: ignore[arg-type]
        if frames < world_size:
            raise DatasetError(
                f"{frames} training frames are too few for {world_size} processes; use fewer devices or more data"
            )
        return FrameOrder(frames, min(self.batch_size, frames // world_size), self.seed, rank, world_size, first_batch)

    def _batches_done(self) -> int:
        assert self.trainer is not None
        return self.trainer.global_step * self.trainer.accumulate_grad_batches

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if not self.val_dataset:
            return []
        shared: DistributedSampler[Any] | None = None
        if self.trainer is not None and self.trainer.world_size > 1:
            shared = DistributedSampler(
                self.val_dataset, self.trainer.world_size, self.trainer.global_rank, shuffle=False
            )
        size = min(self.batch_size, len(self.val_dataset))  # type: ignore[arg-type]
        return self._loader(self.val_dataset, batch_size=size, sampler=shared)

    def _loader(self, subset: Any, **batches: Any) -> DataLoader[Any]:
        cached = isinstance(subset.dataset, FrameCache)
        workers = self.num_workers
        if workers < 0:
            workers = 0 if cached else min(4, os.cpu_count() or 1)
        return DataLoader(
            subset,
            **batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_interrupts,
            # The cache returns whole batches.
            collate_fn=_identity if cached else None,
        )


def _chosen(episodes: list[int] | None, total: int) -> list[int]:
    """The numbers of the episodes that are used, in the dataset's order."""
    if episodes is None:
        return list(range(total))
    wrong = [number for number in episodes if not 0 <= number < total]
    if wrong or not episodes:
        raise DatasetError(f"episodes={episodes}; the dataset has the episodes 0 .. {total - 1}, give some of them")
    return sorted(set(episodes))


def _ignore_interrupts(worker: int) -> None:
    """A terminal sends Ctrl-C to every process; the training still needs frames to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _identity(batch: Any) -> Any:
    return batch
