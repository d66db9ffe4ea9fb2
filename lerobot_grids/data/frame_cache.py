"""A LeRobotDataset that is decoded once into memory.

LeRobotDataset takes milliseconds per frame, mostly for overhead around the decoding of a small PNG. For a small policy
on a CPU this takes as long as the training step itself.
"""

import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lerobot_policy_grids.errors import DatasetError

from .frames import is_scalar

# Share of the machine's memory that decoded frames may take.
MEMORY_SHARE = 0.25


def fits_in_memory(meta: LeRobotDatasetMetadata, columns: Mapping[str, str]) -> bool:
    """Whether the images in these columns are stored as such, and all need less than `MEMORY_SHARE` of the memory."""
    if any(key in columns for key in meta.video_keys):
        return False
    pixels = sum(int(np.prod(meta.features[key]["shape"])) for key in meta.camera_keys if key in columns)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return meta.total_frames * pixels < MEMORY_SHARE * memory


class FrameCache(Dataset[dict[str, Any]]):
    """The items of a LeRobotDataset in batches: `cache.__getitems__(indices)` equals the collated `Frames`.

    Args:
        dataset: A dataset with all episodes, images instead of videos, and `return_uint8=True`.
        columns: Dataset's name -> name in a batch, of the columns that are kept.

    Raises:
        DatasetError: If an image cannot be decoded.
    """

    def __init__(self, dataset: LeRobotDataset, columns: Mapping[str, str]) -> None:
        meta = dataset.meta
        table = dataset.hf_dataset.select_columns(list(columns)).with_format("arrow")[:]
        self.columns: dict[str, Tensor] = {}
        for source, name in columns.items():
            column = table[source].combine_chunks()
            if source in meta.camera_keys:
                self.columns[name] = torch.stack([_decode(cell.as_py(), row) for row, cell in enumerate(column)])
            else:
                numbers = _numbers(column.to_pylist())
                self.columns[name] = numbers[:, None] if is_scalar(meta, source) else numbers
        self.tasks = list(meta.tasks.index)
        episodes = meta.episodes
        starts, ends = (torch.tensor(episodes[f"dataset_{side}_index"]) for side in ("from", "to"))
        episode: Any = self.columns["episode_index"]
        self.first, self.last = starts[episode], ends[episode] - 1
        deltas = dataset.reader.delta_indices or {}
        self.deltas = {columns[source]: torch.tensor(delta) for source, delta in deltas.items() if source in columns}

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one item without batch axis."""
        batch = self.__getitems__([index])
        return {key: value[0] for key, value in batch.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Return a batch: columns [b, ...], or [b, steps, ...] with `<key>_is_pad` for keys with delta timestamps."""
        rows = torch.as_tensor(indices)
        first, last = self.first[rows, None], self.last[rows, None]
        batch: dict[str, Any] = {}
        for key, column in self.columns.items():
            if key in self.deltas:
                wanted = rows[:, None] + self.deltas[key]
                batch[key] = column[wanted.clamp(first, last)]
                batch[f"{key}_is_pad"] = (wanted < first) | (wanted > last)
            else:
                batch[key] = column[rows]
        batch["task"] = [self.tasks[task] for task in batch["task_index"].tolist()]
        return batch


def _numbers(values: list[Any]) -> Tensor:
    """Convert numbers to a tensor; float64 becomes float32, as in LeRobot."""
    array = np.array(values)
    return torch.as_tensor(array.astype(np.float32) if array.dtype == np.float64 else array)


def _decode(image: dict[str, Any], row: int) -> Tensor:
    """Decode an image to uint8 [3, h, w]."""
    try:
        pixels = np.array(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
    except (OSError, TypeError) as error:
        raise DatasetError(f"the image of frame {row} cannot be decoded ({error}); fetch the dataset again") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
