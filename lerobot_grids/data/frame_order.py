"""The order of the frames in training."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

from ..seeds import seed_of


class FrameOrder(Sampler[list[int]]):
    """Endless batches of frame numbers, with a new shuffle in each pass over the data.

    A batch depends only on the seed and the batch's number, so a resumed run gets the same batches, and every process
    computes the same shuffle.

    Args:
        frames: Number of frames.
        batch_size: Number of frames in one process's batch.
        seed: Seed of the shuffling.
        rank: Number of this process.
        world_size: Number of processes.
        first_batch: Returns the number of the first batch; called when iteration begins.
    """

    def __init__(
        self,
        frames: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        first_batch: Callable[[], int] = int,
    ) -> None:
        self.frames, self.seed, self.rank = frames, seed, rank
        self.batch_size, self.world_size = batch_size, world_size
        self.first_batch = first_batch
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> Iterator[list[int]]:
        number = self.first_batch()
        while True:
            yield self.batch(number)
            number += 1

    def batch(self, number: int) -> list[int]:
        """Frames in this process's part of a batch. An incomplete batch at the end of a pass is left out."""
        share = self.batch_size * self.world_size
        over_data, place = divmod(number, self.frames // share)
        start = place * share + self.rank * self.batch_size
        return self._pass(over_data)[start : start + self.batch_size]

    def _pass(self, number: int) -> list[int]:
        if self._shuffled[0] != number:
            generator = torch.Generator().manual_seed(seed_of(self.seed, number))
            self._shuffled = number, torch.randperm(self.frames, generator=generator).tolist()
        return self._shuffled[1]
