"""LeRobotDataModule: a LeRobotDataset, split by episodes into training and validation data."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from lerobot_policy_grids.errors import DatasetError, GridsError

from .frame_cache import FrameCache, fits_in_memory
from .frame_order import FrameOrder

# Dataset feature with object and goal positions. It is not an observation, so no policy gets it.
POSITIONS = "auxiliary.positions"


def load_metadata(dataset: str, revision: str | None = None) -> LeRobotDatasetMetadata:
    """Load the metadata of a dataset from a local folder or the Hub.

    Raises:
        DatasetError: If it is neither, is not a LeRobotDataset v3, or has no camera or no action.
    """
    folder = Path(dataset)
    local = folder.exists() or dataset.startswith((".", "/", "~")) or dataset.count("/") != 1
    if local and not (folder / "meta" / "info.json").is_file():
        seen = "does not exist" if not folder.exists() else "holds no meta/info.json"
        raise DatasetError(
            f"dataset {dataset} {seen}; expected the folder of a LeRobotDataset v3.0, or a Hub id like user/name"
        )
    try:
        if local:
            meta = LeRobotDatasetMetadata(f"local/{folder.name}", root=folder)
        else:
            meta = LeRobotDatasetMetadata(dataset, revision=revision)
    except Exception as error:  # LeRobot raises many types of errors here
        where = "read" if local else "fetched from the Hub (and it is not a folder here)"
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DatasetError(f"dataset {dataset} cannot be {where}: {cause}") from error
    if not meta.camera_keys:
        raise DatasetError(f"dataset {dataset} has no camera, so there are no visual tokens to reduce")
    if ACTION not in meta.features:
        raise DatasetError(f"dataset {dataset} has no '{ACTION}' to learn; it has {', '.join(sorted(meta.features))}")
    return meta


class LeRobotDataModule(lightning.LightningDataModule):
    """Demonstrations for training and validation; validation uses whole held-out episodes.

    Args:
        dataset: Folder of a LeRobotDataset, or its id on the Hub.
        revision: Hub revision of the dataset.
        batch_size: Frames per step and device. None takes 32; the command line uses the family's recipe.
        val_fraction: Share of the episodes held out, spread evenly over the recording.
        max_val_frames: Validate on at most this many of the held-out frames, spread evenly.
        num_workers: Number of processes that load frames. -1 takes 0 for cached frames, else one per core up to 4.
        cache: Whether frames stored as images are decoded once into memory: "auto" (if they need less than a quarter of
            the memory) or "never".
        seed: Seed of the order of the frames.

    Raises:
        DatasetError: If the dataset is missing, unreadable, or has no camera or no action.
    """

    def __init__(
        self,
        dataset: str,
        revision: str | None = None,
        batch_size: int | None = None,
        val_fraction: float = 0.1,
        max_val_frames: int = 512,
        num_workers: int = -1,
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
        self.meta = load_metadata(dataset, revision)
        self.revision = revision
        self.batch_size = 32 if batch_size is None else batch_size
        self.val_fraction = val_fraction
        self.max_val_frames = max_val_frames
        self.num_workers = num_workers
        self.cache = cache
        self.seed = seed
        self.train_dataset: Dataset[Any] | None = None
        self.val_dataset: Dataset[Any] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The options that decide which frames a step gets, except the number of processes."""
        return {
            "frames": self.meta.total_frames,
            "revision": self.revision,
            "batch_size": self.batch_size,
            "val_fraction": self.val_fraction,
            "seed": self.seed,
        }

    def split(self) -> tuple[list[int], list[int]]:
        """Episode indices for (training, validation). With fewer than two episodes nothing is held out."""
        episodes = list(range(self.meta.total_episodes))
        held_out = round(self.val_fraction * len(episodes))
        if self.val_fraction > 0 and len(episodes) > 1:
            held_out = max(held_out, 1)
        # Spread evenly, so that every task and every session is represented.
        val = {(2 * i + 1) * len(episodes) // (2 * held_out) for i in range(held_out)} if held_out else set()
        return [e for e in episodes if e not in val], sorted(val)

    def setup(self, stage: str | None = None) -> None:
        if self.train_dataset is None:
            if self.trainer is None:
                raise RuntimeError("setup needs a trainer, because the module's policy decides which frames are loaded")
            self.load(self.trainer.lightning_module.policy.config)

    def load(self, config: PreTrainedConfig) -> None:
        """Open the dataset with the delta timestamps of a policy's configuration."""
        dataset = LeRobotDataset(
            self.meta.repo_id,
            root=self.meta.root,
            revision=self.revision,
            delta_timestamps=resolve_delta_timestamps(config, self.meta),
            return_uint8=True,
        )
        if self.cache == "auto" and fits_in_memory(self.meta):
            frames: Dataset[Any] = FrameCache(dataset)
        else:
            frames = dataset
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
            # The cache returns whole batches.
            collate_fn=_identity if cached else None,
        )


def _identity(batch: Any) -> Any:
    return batch
