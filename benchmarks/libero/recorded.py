"""The frames of a recording, prepared once: as the vision tower sees them, normalised, and with their action chunks."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from prefix import see
from torch import Tensor
from torch.nn import functional

from lerobot_grids.data import load_metadata
from lerobot_grids.data.frame_cache import FrameCache
from lerobot_grids.data.frames import default_video_backend
from lerobot_grids.data.metadata import PLACES, POSITIONS
from lerobot_grids.policies import LoadedPolicy
from lerobot_policy_grids.reducers.layout import cell_coordinates

# Every tenth episode is held out.
HELD_OUT = 10
# Of a recording only centres of objects are known; tokens up to this far from them may show them.
NEAR = 2.5


@dataclass
class Frames:
    """Frames of a recording; every field has them on its first axis.

    Attributes:
        seen: What the vision tower says, bfloat16 [n, cameras, tokens, c].
        words: int64 [n, words].
        mask: Which words exist, bool [n, words].
        state: Normalised [n, d].
        actions: Normalised [n, chunk, d].
        over: Which actions are behind the episode's end, bool [n, chunk].
        positions: Of the named object and the goal, in metres [n, 6].
        show: Which visual tokens show the named object or the goal, bool [n, cameras, tokens].
        held: Frames of episodes that are held out, bool [n].
    """

    seen: Tensor
    words: Tensor
    mask: Tensor
    state: Tensor
    actions: Tensor
    over: Tensor
    positions: Tensor
    show: Tensor
    held: Tensor

    def at(self, index: Tensor) -> Self:
        """Some of the frames."""
        return replace(self, **{name: value[index] for name, value in vars(self).items()})

    def beside(self, other: Self) -> Self:
        """These frames and others. Instructions of other lengths are padded."""
        length = max(self.words.shape[1], other.words.shape[1])
        both = [frames._padded(length) for frames in (self, other)]
        return replace(self, **{name: torch.cat([vars(frames)[name] for frames in both]) for name in vars(self)})

    def _padded(self, length: int) -> Self:
        missing = (0, length - self.words.shape[1])
        words, mask = functional.pad(self.words, missing), functional.pad(self.mask, missing)
        return replace(self, words=words, mask=mask)


def read(loaded: LoadedPolicy, dataset: str) -> Frames:
    """Read the frames of a recorded dataset for a small policy."""
    meta, config = load_metadata(dataset), loaded.policy.config
    chunk = {"action": [step / meta.fps for step in range(config.chunk_size)]}
    backend = default_video_backend()
    source = LeRobotDataset(
        meta.repo_id, root=meta.root, delta_timestamps=chunk, return_uint8=True, video_backend=backend
    )
    cameras = list(config.image_features)
    kept = [*cameras, "observation.state", "action", POSITIONS, PLACES, "episode_index", "task_index"]
    batch = FrameCache(source, {name: name for name in kept}).__getitems__(list(range(meta.total_frames)))
    seen = see(loaded.policy, torch.stack([batch.pop(name) for name in cameras], 1))
    positions, places, episodes = (batch.pop(name) for name in (POSITIONS, PLACES, "episode_index"))
    ready = loaded.preprocessor(batch)
    return Frames(
        seen=seen,
        words=ready["observation.language.tokens"],
        mask=ready["observation.language.attention_mask"].bool(),
        state=ready["observation.state"],
        actions=ready["action"],
        over=ready["action_is_pad"],
        positions=positions,
        show=near(places.unflatten(1, (len(cameras), -1, 2)), seen.shape[2]),
        held=episodes % HELD_OUT == HELD_OUT - 1,
    )


def near(places: Tensor, tokens: int) -> Tensor:
    """Which of a camera's visual tokens are near one of some places in its image.

    Args:
        places: (x, y) from 0 to 1, [n, cameras, places, 2].
        tokens: Number of tokens, which make a square.

    Returns:
        bool [n, cameras, tokens], row by row.
    """
    side = round(tokens**0.5)
    away = side * (places[..., None, :] - cell_coordinates((side, side))).norm(dim=-1)
    return (away < NEAR).any(2)
