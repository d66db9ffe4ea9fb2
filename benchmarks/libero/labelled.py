"""The labelled scenes of scenes.py, prepared once: as the vision tower sees them, and with instructions."""

from pathlib import Path

import numpy as np
import torch
from prefix import see
from recorded import Frames
from torch import Tensor
from torch.nn import functional

from lerobot_grids.policies import LoadedPolicy

# Scenes that are held out, every tenth, and further brightnesses in which each of the others is seen.
HELD_OUT, VIEWS = 10, 1
# A token is on an object if so much of its patch shows it.
SHARE = 0.15
UNNAMED, GOAL = ("background", "robot", "basket"), "basket"
# How much more often than another object the one is named for which the expert's actions are known.
KNOWN = 5.0
# Actions so many standard deviations large are in no demonstration.
UNUSUAL = 5.0


def read_scenes(files: list[Path]) -> tuple[dict[str, Tensor], list[str]]:
    """(What scenes.py saved in some files together, names of the classes), with one number for a class in all files."""
    parts = [dict(np.load(file)) for file in files]
    classes = list(dict.fromkeys(str(name) for part in parts for name in part["classes"]))
    for part in parts:
        numbers = np.array([classes.index(str(name)) for name in part.pop("classes")])
        part["labels"], part["named"] = numbers.astype(np.uint8)[part["labels"]], numbers[part["named"]]
        positions = np.full((len(part["named"]), len(classes), 3), np.nan, np.float32)
        positions[:, numbers] = part["positions"]
        part["positions"] = positions
    return {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}, classes


class Scenes:
    """Labelled scenes, and instructions that name an object of them.

    Args:
        files: What scenes.py saved.
        loaded: A policy.
        instruction: With a place for an object's name.

    Attributes:
        held: Which scenes are held out, bool [n].
        known: In which scenes the expert's actions are like those of demonstrations, bool [n].
    """

    def __init__(self, files: list[Path], loaded: LoadedPolicy, instruction: str) -> None:
        drawn, self.classes = read_scenes(files)
        self.named, self.positions = drawn["named"], drawn["positions"]
        patch = loaded.policy.config.patch_size
        patches = drawn["labels"].unfold(2, patch, patch).unfold(3, patch, patch).flatten(4).flatten(1, 3)
        # Share of each patch that shows each class, [scenes, visual tokens of all cameras, classes].
        self.shares = torch.stack([(patches == number).float().mean(-1) for number in range(len(self.classes))], -1)
        visible = (self.shares > SHARE).any(1)
        visible[:, [number for number, name in enumerate(self.classes) if name in UNNAMED]] = False
        self.chances = visible * (1 + (KNOWN - 1) * functional.one_hot(self.named, len(self.classes)))
        states, actions = drawn["states"], drawn["actions"]
        texts = [instruction.format(name.replace("_", " ")) for name in self.classes]
        words = loaded.preprocessor({"task": texts, "observation.state": states[: len(texts)]})
        self.words, self.mask = (words[f"observation.language.{part}"] for part in ("tokens", "attention_mask"))
        ready = loaded.preprocessor({"task": [""] * len(states), "observation.state": states, "action": actions})
        missing = loaded.policy.config.chunk_size - actions.shape[1]
        self.states, self.actions = ready["observation.state"], functional.pad(ready["action"], (0, 0, 0, missing))
        # An arm that is anywhere has a tilted hand, and no demonstration shows how to straighten it.
        self.known = self.actions.abs().amax((1, 2)) < UNUSUAL
        self.over = (torch.arange(self.actions.shape[1]) >= actions.shape[1]) | ~self.known[:, None]
        images = drawn["images"].permute(0, 1, 4, 2, 3)
        self.seen = torch.stack(
            [see(loaded.policy, images), *(see(loaded.policy, jitter(images)) for _ in range(VIEWS))]
        )
        self.held = torch.arange(len(images)) % HELD_OUT == 0

    def ask(self, index: Tensor, views: int = VIEWS) -> tuple[Frames, Tensor]:
        """Name an object in some scenes.

        Returns:
            (frames, in which no action is known unless the object is the task's;
            which visual tokens are on the named object, bool [b, visual tokens]).
        """
        named = torch.multinomial(self.chances[index], 1)[:, 0]
        asked = self.frames(index, named, torch.randint(1 + views, index.shape))
        return asked, self.shares[index, :, named] > SHARE

    def frames(self, index: Tensor, named: Tensor, view: Tensor) -> Frames:
        """Some scenes, with an object of each that is named, in one of the views."""
        goal = torch.full_like(named, self.classes.index(GOAL))
        show = (self.shares[index, :, named] > SHARE) | (self.shares[index, :, goal] > SHARE)
        return Frames(
            seen=self.seen[view, index],
            words=self.words[named],
            mask=self.mask[named].bool(),
            state=self.states[index],
            actions=self.actions[index],
            over=self.over[index] | (named != self.named[index])[:, None],
            positions=torch.cat([self.positions[index, named], self.positions[index, goal]], -1),
            show=show.unflatten(1, self.seen.shape[2:4]),
            held=self.held[index],
        )


def jitter(images: Tensor) -> Tensor:
    """Images uint8 [n, cameras, 3, h, w] in other brightness and contrast, one for each scene."""
    gain = torch.empty(len(images), 1, 1, 1, 1).uniform_(0.8, 1.2)
    shift = torch.empty_like(gain).uniform_(-20, 20)
    return ((images.float() - 128) * gain + 128 + shift).clamp(0, 255).to(torch.uint8)
