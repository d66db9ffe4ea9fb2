"""Teach the language model of a small policy which words mean which object, as a real VLM knows before it sees a robot.

    python benchmarks/libero/grounding.py outputs/libero/scenes.npz DATASET outputs/libero/start outputs/libero/grounded

The instruction names an object. Behind the first layer each visual token learns to say whether that object is in its
patch, and behind the second the token of the robot's state says where object and goal are. Half of each batch are
labelled scenes, the other half frames of the recording in which the hand comes near: once it holds the object, the
robot's state tells where that is. The vision tower stays as it is, and the action expert is not touched. At the end, in
scenes and episodes that were left out: how often the strongest token is on the named object, and how far off its
position is told.
"""

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from descent import descend
from prefix import PATCH, Prefix, see
from recorded import Frames, read
from torch import Tensor, nn
from torch.nn import functional

from lerobot_grids.policies import LoadedPolicy, load

# Scenes that are held out, every tenth, and further brightnesses in which each of the others is seen.
HELD_OUT, VIEWS = 10, 1
# A token is on an object if so much of its patch shows it.
SHARE = 0.15
UNNAMED, GOAL = ("background", "robot", "basket"), "basket"
RATE, BATCH = 1.5e-3, 40
# Of the frames in which the hand holds something, every n-th is used.
HOLDING = 5
GRIPPER = -1


@dataclass
class Batch:
    """What the trunk sees, and what it has to say: `on` [b, visual tokens], None for frames, and `positions` [b, 6]."""

    seen: Tensor
    words: Tensor
    mask: Tensor
    state: Tensor
    positions: Tensor
    on: Tensor | None = None

    @classmethod
    def of(cls, frames: Frames, index: Tensor) -> Self:
        """Some frames of a recording."""
        parts = (frames.seen, frames.words, frames.mask, frames.state, frames.positions)
        return cls(*(part[index] for part in parts))


class Scenes:
    """Labelled scenes, and instructions that name an object of them."""

    def __init__(self, file: Path, loaded: LoadedPolicy, instruction: str, states: Tensor) -> None:
        content = np.load(file)
        classes = [str(name) for name in content["classes"]]
        self.positions, self.states = torch.from_numpy(content["positions"]), states
        self.goal = self.positions[:, classes.index(GOAL)]
        labels = torch.from_numpy(content["labels"])
        # Share of each patch that shows each class, [scenes, visual tokens of all cameras, classes].
        patches = labels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(4).flatten(1, 3)
        self.shares = torch.stack([(patches == number).float().mean(-1) for number in range(len(classes))], -1)
        visible = (self.shares > SHARE).any(1)
        visible[:, [number for number, name in enumerate(classes) if name in UNNAMED]] = False
        self.visible = visible.float()
        texts = [instruction.format(name.replace("_", " ")) for name in classes]
        ready = loaded.preprocessor({"task": texts, "observation.state": states[:1].expand(len(texts), -1)})
        self.words, self.mask = (ready[f"observation.language.{part}"] for part in ("tokens", "attention_mask"))
        images = torch.from_numpy(content["images"]).permute(0, 1, 4, 2, 3)
        self.seen = torch.stack(
            [see(loaded.policy, images), *(see(loaded.policy, jitter(images)) for _ in range(VIEWS))]
        )

    def batch(self, index: Tensor, views: int = VIEWS) -> Batch:
        """Some scenes; the object is drawn. The arm is anywhere in them, so the state is that of any frame."""
        named = torch.multinomial(self.visible[index], 1)[:, 0]
        return Batch(
            seen=self.seen[torch.randint(1 + views, index.shape), index],
            words=self.words[named],
            mask=self.mask[named].bool(),
            state=self.states[torch.randint(len(self.states), index.shape)],
            positions=torch.cat([self.positions[index, named], self.goal[index]], -1),
            on=self.shares[index, :, named] > SHARE,
        )


def approaches(frames: Frames) -> Tensor:
    """In which frames the gripper is told to be open, bool [n]; normalised actions of the gripper have two signs."""
    return frames.actions[:, 0, GRIPPER] < 0


def jitter(images: Tensor) -> Tensor:
    """Images uint8 [n, cameras, 3, h, w] in other brightness and contrast, one for each scene."""
    gain = torch.empty(len(images), 1, 1, 1, 1).uniform_(0.8, 1.2)
    shift = torch.empty_like(gain).uniform_(-20, 20)
    return ((images.float() - 128) * gain + 128 + shift).clamp(0, 255).to(torch.uint8)


class Grounding(nn.Module):
    """The first two layers of a policy's trunk, and read-outs of what they say."""

    def __init__(self, prefix: Prefix, positions: Tensor) -> None:
        super().__init__()
        self.prefix, width = prefix, prefix.width
        self.point = nn.Linear(width, 1)
        self.place = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, positions.shape[-1]))
        # The third layer learns nothing here, so it hands on what it gets. Of the last one nothing but keys and values
        # is ever read.
        third = prefix.layers[2]
        nn.init.zeros_(third.self_attn.o_proj.weight)
        nn.init.zeros_(third.mlp.down_proj.weight)
        self.mean, self.std = positions.mean(0), positions.std(0).clamp_min(0.02)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(scores of the visual tokens [b, n], positions [b, 6] in standard deviations)."""
        tokens, exist = self.prefix.embed(batch.seen, batch.words, batch.mask, batch.state)
        tokens = self.prefix.behind(0, tokens, exist)
        scores = self.point(tokens[:, : batch.seen.shape[1] * batch.seen.shape[2]])[..., 0]
        robot = self.prefix.behind(1, tokens, exist)[:, -1]
        return scores.float(), self.place(robot).float()

    def loss(self, batch: Batch) -> Tensor:
        """Of pointing, where it is known which tokens are right, and of the positions."""
        scores, said = self(batch)
        off = 2 * functional.smooth_l1_loss(said, (batch.positions - self.mean) / self.std, beta=0.2)
        if batch.on is None:
            return off
        rare = torch.tensor(20.0)
        return off + functional.binary_cross_entropy_with_logits(scores, batch.on.float(), pos_weight=rare)

    def off(self, said: Tensor, batch: Batch) -> Tensor:
        """Distances in metres on the table [b] between said and true positions of the named object."""
        return ((said * self.std + self.mean) - batch.positions)[:, :2].norm(dim=-1)


def train(grounding: Grounding, scenes: Scenes, frames: Frames, kept: Tensor, steps: int) -> None:
    """Train trunk and read-outs on the scenes `kept` and the frames that are not held out."""
    near = approaches(frames)
    come_near, hold = torch.where(~frames.held & near)[0], torch.where(~frames.held & ~near)[0]
    shown = torch.cat([come_near, hold[::HOLDING]])

    def compute_loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = grounding.loss(scenes.batch(kept[torch.randint(len(kept), (BATCH // 2,))]))
            return loss + grounding.loss(Batch.of(frames, shown[torch.randint(len(shown), (BATCH // 2,))]))

    for step, loss in descend(grounding, compute_loss, steps=steps, rate=RATE, warmup=0.1, betas=(0.9, 0.95)):
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)


@torch.no_grad()
def measure(grounding: Grounding, scenes: Scenes, frames: Frames, held: Tensor) -> dict[str, Any]:
    """How well it points and reads positions (median, 90th percentile), in scenes and frames that were left out."""
    right, far = [], []
    for part in held.repeat(4).split(40):
        batch = scenes.batch(part, views=0)
        scores, said = grounding(batch)
        assert batch.on is not None
        right += batch.on.gather(1, scores.argmax(1, keepdim=True))[:, 0].tolist()
        far += grounding.off(said, batch).tolist()
    recorded = []
    for part in torch.where(frames.held & approaches(frames))[0][::4].split(40):
        batch = Batch.of(frames, part)
        recorded += grounding.off(grounding(batch)[1], batch).tolist()
    return {
        "points_at_named": round(float(np.mean(right)), 3),
        "questions": len(right),
        "centimetres_off": {
            name: [round(100 * float(part), 2) for part in np.quantile(off, (0.5, 0.9))]
            for name, off in (("scenes", far), ("frames", recorded))
        },
        "frames": len(recorded),
    }


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path)
    parser.add_argument("dataset", help="recorded demonstrations")
    parser.add_argument("start", type=Path, help="policy that tower.py made")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--instruction", default="pick up the {} and place it in the basket")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    begin = time.perf_counter()
    loaded = load(arguments.start)
    frames = read(loaded, arguments.dataset)
    scenes = Scenes(arguments.scenes, loaded, arguments.instruction, frames.state[~frames.held])
    held = torch.arange(len(scenes.positions)) % HELD_OUT == 0
    policy = loaded.policy.train()
    for name, weight in policy.named_parameters():
        weight.requires_grad_("state_proj" in name or (".vlm." in name and "vision_model" not in name))
    grounding = Grounding(Prefix(policy), frames.positions)
    train(grounding, scenes, frames, torch.where(~held)[0], arguments.steps)
    seen = measure(grounding.eval(), scenes, frames, torch.where(held)[0])
    print(json.dumps(seen, indent=2))
    # The action expert reads what the trunk knows now, and the trunk stays as it is.
    policy.config.train_expert_only = True
    shutil.copytree(arguments.start, arguments.output, dirs_exist_ok=True)
    policy.save_pretrained(arguments.output)
    seen |= {"steps": arguments.steps, "scenes": int((~held).sum()), "seconds": round(time.perf_counter() - begin)}
    (arguments.output / "grounding.json").write_text(json.dumps(seen, indent=2) + "\n")


if __name__ == "__main__":
    main()
