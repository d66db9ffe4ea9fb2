r"""Teach the language model of a small policy what words mean, as a real VLM knows before it sees a robot.

    python benchmarks/libero/grounding.py outputs/libero/scenes.npz --dataset outputs/libero/object \
        --start outputs/libero/start --output outputs/libero/grounded

The instruction names an object. Behind the first layer each visual token learns to say whether that object is in its
patch, and at first nothing else is learned: with everything at once that takes many times as long. Behind the second
and the third layer the token of the robot's state says where object and goal are, and behind the third also the next
actions. Half of each batch are labelled scenes, the other half frames of the recording, most of them with the hand on
its way: once it holds the object, the robot's state tells where that is. In most steps the trunk reads only a third of
the visual tokens: those on object and goal, and others by chance. The vision tower stays as it is, and the action
expert is not touched. At the end, in scenes and episodes that were left out: how often the strongest token is on the
named object, and how far off its position is told.
"""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from descent import descend, lower_precision
from labelled import Scenes
from prefix import Prefix
from recorded import Frames, read
from stage import action_head, begin, command_line, hand_on, keep
from torch import Tensor, nn
from torch.nn import functional

from lerobot_grids.policies import load
from lerobot_policy_grids.families.distances import mean_where

RATE, BATCH = 1.5e-3, 40
# How much more a visual token counts that is on the named object.
RARE = 20.0
# Of the frames in which the hand holds something, every n-th is used.
HOLDING = 3
GRIPPER = -1
# Visual tokens of each camera that are read in most steps; a square, because the connector asks for one.
KEPT = 49


def pointing(scores: Tensor, on: Tensor) -> Tensor:
    """The loss of scores of visual tokens [b, n], of which few are right."""
    return functional.binary_cross_entropy_with_logits(scores, on.float(), pos_weight=torch.tensor(RARE))


def approaches(frames: Frames) -> Tensor:
    """In which frames the gripper is told to be open, bool [n]; normalised actions of the gripper have two signs."""
    return frames.actions[:, 0, GRIPPER] < 0


def thin(frames: Frames) -> tuple[Frames, Tensor]:
    """(Frames with `KEPT` visual tokens of each camera, where these are among all visual tokens, int64 [b, n])."""
    chosen = (frames.show + torch.rand(frames.show.shape)).topk(KEPT).indices.sort().values
    seen = frames.seen.gather(2, chosen[..., None].expand(-1, -1, -1, frames.seen.shape[-1]))
    cameras, tokens = frames.show.shape[1:]
    return replace(frames, seen=seen), (chosen + tokens * torch.arange(cameras)[:, None]).flatten(1)


class Grounding(nn.Module):
    """The first three layers of a policy's trunk, and read-outs of what they say."""

    def __init__(self, prefix: Prefix, frames: Frames) -> None:
        super().__init__()
        self.prefix, width = prefix, prefix.width
        places, self.chunk = frames.positions.shape[-1], frames.actions.shape[1:]
        self.point = nn.Linear(width, 1)
        self.places = nn.ModuleList(nn.Sequential(nn.RMSNorm(width), nn.Linear(width, places)) for _ in range(2))
        self.act = action_head(width, self.chunk)
        # The third layer begins as one that hands on what it gets. Of the last one only keys and values are ever read.
        hand_on(prefix.layers[2])
        self.mean, self.std = frames.positions.mean(0), frames.positions.std(0).clamp_min(0.02)

    def pointed(self, frames: Frames, visual: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(Scores of the visual tokens [b, n], all tokens behind the first layer [b, t, c], which they are).

        Args:
            frames: What is asked.
            visual: Where the frames' visual tokens are among all, int64 [b, n]; None if they are all.
        """
        tokens, exist = self.prefix.embed(frames.seen, frames.words, frames.mask, frames.state)
        count = frames.seen.shape[1] * frames.seen.shape[2]
        places = exist.cumsum(1) - 1
        if visual is not None:
            places = torch.cat([visual, places[:, count:] + frames.show[0].numel() - count], 1)
        which = {"exist": exist, "places": places}
        tokens = self.prefix.behind(0, tokens, **which)
        return self.point(tokens[:, :count])[..., 0].float(), tokens, which

    def forward(self, frames: Frames, visual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(Scores of the visual tokens [b, n], positions in standard deviations [2, b, 6], actions [b, chunk, d])."""
        scores, tokens, which = self.pointed(frames, visual)
        tokens = self.prefix.behind(1, tokens, **which)
        robot = [tokens[:, -1], self.prefix.behind(2, tokens, **which, robot_only=True)[:, 0]]
        said = torch.stack([place(token).float() for place, token in zip(self.places, robot, strict=True)])
        return scores, said, self.act(robot[1]).float().unflatten(-1, self.chunk)

    def loss(self, frames: Frames, on: Tensor | None = None, thinned: bool = False) -> Tensor:
        """Of the positions, the actions, and of pointing if it is known which visual tokens are right."""
        visual = None
        if thinned:
            frames, visual = thin(frames)
            on = None if on is None else on.gather(1, visual)
        scores, said, actions = self(frames, visual)
        wanted = (frames.positions - self.mean) / self.std
        loss = 2 * functional.smooth_l1_loss(said, wanted.expand_as(said), beta=0.05)
        loss = loss + mean_where((actions - frames.actions).abs().mean(-1), ~frames.over)
        return loss if on is None else loss + pointing(scores, on)

    def off(self, said: Tensor, positions: Tensor) -> Tensor:
        """Distances in metres on the table [b] between said and true positions of the named object."""
        return ((said * self.std + self.mean) - positions)[:, :2].norm(dim=-1)


def train(grounding: Grounding, scenes: Scenes, frames: Frames, counts: dict[str, int]) -> None:
    """Train trunk and read-outs on what is not held out: first to point, then everything, at last with all tokens.

    Args:
        grounding: What is trained.
        scenes: Labelled scenes.
        frames: Of a recording.
        counts: Steps of the three stages, {name: number}.
    """
    near, kept = approaches(frames), torch.where(~scenes.held)[0]
    come_near, hold = torch.where(~frames.held & near)[0], torch.where(~frames.held & ~near)[0]
    shown = torch.cat([come_near, hold[::HOLDING]])

    def draw(index: Tensor) -> Tensor:
        return index[torch.randint(len(index), (BATCH // 2,))]

    def point() -> Tensor:
        asked, on = scenes.ask(torch.cat([draw(kept), draw(kept)]))
        with lower_precision():
            return pointing(grounding.pointed(asked)[0], on)

    def do_everything(thinned: bool) -> Tensor:
        with lower_precision():
            asked, on = scenes.ask(draw(kept))
            return grounding.loss(asked, on, thinned) + grounding.loss(frames.at(draw(shown)), thinned=thinned)

    losses = (point, partial(do_everything, True), partial(do_everything, False))
    for compute_loss, (name, count) in zip(losses, counts.items(), strict=True):
        for step, loss in descend(grounding, compute_loss, steps=count, rate=RATE, warmup=0.1, betas=(0.9, 0.95)):
            if step % 100 == 0:
                print(f"{name} {step}: loss {loss:.3f}", flush=True)


@torch.no_grad()
def measure(grounding: Grounding, scenes: Scenes, frames: Frames) -> dict[str, Any]:
    """How well it points, and reads positions (median, 90th percentile), in what was left out."""
    right, far = [], []
    for part in torch.where(scenes.held)[0].repeat(4).split(40):
        asked, on = scenes.ask(part, views=0)
        scores, said, _ = grounding(asked)
        right += on.gather(1, scores.argmax(1, keepdim=True))[:, 0].tolist()
        far += grounding.off(said[-1], asked.positions).tolist()
    recorded, wrong = [], []
    for part in torch.where(frames.held & approaches(frames))[0][::4].split(40):
        shown = frames.at(part)
        _, said, actions = grounding(shown)
        recorded += grounding.off(said[-1], shown.positions).tolist()
        wrong += (actions - shown.actions).abs().mean(-1)[~shown.over].tolist()
    return {
        "points_at_named": round(float(np.mean(right)), 3),
        "questions": len(right),
        "centimetres_off": {
            name: [round(100 * float(part), 2) for part in np.quantile(off, (0.5, 0.9))]
            for name, off in (("scenes", far), ("frames", recorded))
        },
        "frames": len(recorded),
        "actions_off": round(float(np.mean(wrong)), 3),
    }


def main() -> None:
    """Train, measure, save."""
    parser = command_line(__doc__, start="tower.py", steps=1000)
    parser.add_argument("--pointing_steps", type=int, default=700, help="at first, of pointing alone")
    parser.add_argument("--thin_steps", type=int, default=6000, help="then, of everything with some visual tokens")
    arguments = begin(parser)
    start = time.perf_counter()
    loaded = load(arguments.start)
    frames = read(loaded, arguments.dataset)
    scenes = Scenes(arguments.scenes, loaded, arguments.instruction)
    policy = loaded.policy.train()
    for name, weight in policy.named_parameters():
        weight.requires_grad_("state_proj" in name or (".vlm." in name and "vision_model" not in name))
    grounding = Grounding(Prefix(policy), frames)
    counts = {name: getattr(arguments, name) for name in ("pointing_steps", "thin_steps", "steps")}
    train(grounding, scenes, frames, counts)
    seen = measure(grounding.eval(), scenes, frames)
    # The action expert reads what the trunk knows now, and the trunk stays as it is.
    policy.config.train_expert_only = True
    seen |= {
        **counts,
        "scenes": int((~scenes.held).sum()),
        "seconds": round(time.perf_counter() - start),
    }
    keep(policy, arguments, "grounding.json", seen)


if __name__ == "__main__":
    main()
