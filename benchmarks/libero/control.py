r"""Teach the third layer of a grounded trunk what the robot does next, from the token that knows where things are.

    python benchmarks/libero/control.py outputs/libero/scenes.npz --dataset outputs/libero/object \
        --start outputs/libero/grounded --output outputs/libero/controlled    # 12 minutes, two cores

A controller that is told the true places learns from the same demonstrations within two minutes, because it sees a
million examples. So the token of the robot's state is computed once for every frame behind the second layer. The third
layer attends to nothing here: its perceptron alone turns that token into one from which the actions are read.
"""

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from descent import descend
from grounding import HIDDEN
from labelled import VIEWS, Scenes
from prefix import Prefix
from recorded import Frames, read
from torch import Tensor, nn

from lerobot_grids.policies import load

RATE, BATCH = 2e-3, 256
# Noise on the token, in standard deviations, so that frames are not learned by heart.
NOISE = 0.05


@dataclass
class Robots:
    """The robot's token of frames behind the second layer [n, c], and the frames."""

    tokens: Tensor
    frames: Frames

    @classmethod
    def of(cls, prefix: Prefix, frames: Frames) -> "Robots":
        """Compute the tokens, and keep nothing of the images."""
        tokens = []
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            for index in torch.arange(len(frames.state)).split(64):
                part = frames.at(index)
                all_tokens, exist = prefix.embed(part.seen, part.words, part.mask, part.state)
                all_tokens = prefix.behind(0, all_tokens, exist)
                tokens.append(prefix.behind(1, all_tokens, exist, robot_only=True)[:, 0].float())
        return cls(torch.cat(tokens), frames)


class Controller(nn.Module):
    """The perceptron of the third layer, and a read-out of actions."""

    def __init__(self, prefix: Prefix, robots: Robots) -> None:
        super().__init__()
        self.robots, self.scale = robots, robots.tokens.std(0)
        self.chunk = robots.frames.actions.shape[1:]
        third = prefix.layers[2]
        nn.init.zeros_(third.self_attn.o_proj.weight)
        nn.init.zeros_(third.mlp.down_proj.weight)
        self.norm, self.mlp = third.post_attention_layernorm, third.mlp
        self.act = nn.Sequential(
            nn.RMSNorm(prefix.width), nn.Linear(prefix.width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, self.chunk.numel())
        )

    def off(self, index: Tensor, noise: float = 0.0) -> Tensor:
        """Mean distance of the told actions from the right ones, in standard deviations."""
        frames, tokens = self.robots.frames, self.robots.tokens[index]
        tokens = tokens + noise * self.scale * torch.randn_like(tokens)
        told = self.act(tokens + self.mlp(self.norm(tokens))).unflatten(-1, self.chunk)
        error, known = (told - frames.actions[index]).abs().mean(-1), ~frames.over[index]
        return (error * known).sum() / known.sum()


def train(controller: Controller, steps: int) -> None:
    """Train it on what is not held out."""
    shown, held = (torch.where(controller.robots.frames.held == which)[0] for which in (False, True))

    def compute_loss() -> Tensor:
        return controller.off(shown[torch.randint(len(shown), (BATCH,))], NOISE)

    for step, loss in descend(controller, compute_loss, steps=steps, rate=RATE):
        if step % 1000 == 0:
            with torch.no_grad():
                print(f"step {step}: loss {loss:.3f}, held out {controller.off(held):.3f}", flush=True)


def main() -> None:
    """Train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, nargs="+", help="files that scenes.py made")
    parser.add_argument("--dataset", required=True, help="recorded demonstrations")
    parser.add_argument("--start", required=True, type=Path, help="policy that grounding.py made")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--instruction", default="pick up the {} and place it in the basket", help="of the scenes")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    begin = time.perf_counter()
    loaded = load(arguments.start)
    policy = loaded.policy.eval().requires_grad_(False)
    scenes = Scenes(arguments.scenes, loaded, arguments.instruction)
    known, frames = torch.where(scenes.known)[0], read(loaded, arguments.dataset)
    for view in range(1 + VIEWS):
        frames = frames.beside(scenes.frames(known, scenes.named[known], torch.full_like(known, view)))
    prefix = Prefix(policy)
    controller = Controller(prefix, Robots.of(prefix, frames))
    controller.mlp.requires_grad_(True)
    controller.norm.requires_grad_(True)
    train(controller, arguments.steps)
    shutil.copytree(arguments.start, arguments.output, dirs_exist_ok=True)
    policy.save_pretrained(arguments.output)
    with torch.no_grad():
        off = controller.off(torch.where(frames.held)[0])
    said = {"actions_off": round(float(off), 3), "steps": arguments.steps, "frames": int((~frames.held).sum())}
    said |= {"seconds": round(time.perf_counter() - begin)}
    print(json.dumps(said, indent=2))
    (arguments.output / "control.json").write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
