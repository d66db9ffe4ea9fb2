r"""Teach the third layer of a grounded trunk what the robot does next, from the token that knows where things are.

    python benchmarks/libero/control.py outputs/libero/scenes.npz --dataset outputs/libero/object \
        --start outputs/libero/grounded --output outputs/libero/controlled    # 12 minutes, two cores

A controller that is told the true places learns from the same demonstrations within two minutes, because it sees a
million examples. So the token of the robot's state is computed once for every frame behind the second layer. The third
layer attends to nothing here: its perceptron alone turns that token into one from which the actions are read.
"""

import time

import torch
from descent import descend, lower_precision
from labelled import VIEWS, Scenes
from prefix import Prefix
from recorded import Frames, read
from stage import action_head, begin, command_line, hand_on, keep
from torch import Tensor, nn

from lerobot_grids.policies import load
from lerobot_policy_grids.families.distances import mean_where

RATE, BATCH = 2e-3, 256
# Noise on the token, in standard deviations, so that frames are not learned by heart.
NOISE = 0.05


@torch.no_grad()
def robot_tokens(prefix: Prefix, frames: Frames) -> Tensor:
    """The robot's token of frames behind the second layer, [n, c]."""
    tokens = []
    with lower_precision():
        for index in torch.arange(len(frames.state)).split(64):
            part = frames.at(index)
            embedded, exist = prefix.embed(part.seen, part.words, part.mask, part.state)
            first = prefix.behind(0, embedded, exist)
            tokens.append(prefix.behind(1, first, exist, robot_only=True)[:, 0].float())
    return torch.cat(tokens)


class Controller(nn.Module):
    """The perceptron of the third layer, and a read-out of actions."""

    def __init__(self, prefix: Prefix, frames: Frames) -> None:
        super().__init__()
        self.frames, self.tokens = frames, robot_tokens(prefix, frames)
        self.scale, self.chunk = self.tokens.std(0), frames.actions.shape[1:]
        third = prefix.layers[2]
        hand_on(third)
        self.norm, self.mlp = third.post_attention_layernorm, third.mlp
        self.act = action_head(prefix.width, self.chunk)

    def off(self, index: Tensor, noise: float = 0.0) -> Tensor:
        """Mean distance of the told actions from the right ones, in standard deviations."""
        tokens = self.tokens[index]
        tokens = tokens + noise * self.scale * torch.randn_like(tokens)
        told = self.act(tokens + self.mlp(self.norm(tokens))).unflatten(-1, self.chunk)
        return mean_where((told - self.frames.actions[index]).abs().mean(-1), ~self.frames.over[index])


def train(controller: Controller, steps: int) -> None:
    """Train it on what is not held out."""
    shown, held = (torch.where(controller.frames.held == which)[0] for which in (False, True))

    def compute_loss() -> Tensor:
        return controller.off(shown[torch.randint(len(shown), (BATCH,))], NOISE)

    for step, loss in descend(controller, compute_loss, steps=steps, rate=RATE):
        if step % 1000 == 0:
            with torch.no_grad():
                print(f"step {step}: loss {loss:.3f}, held out {controller.off(held):.3f}", flush=True)


def main() -> None:
    """Train, save."""
    arguments = begin(command_line(__doc__, start="grounding.py", steps=8000))
    start = time.perf_counter()
    loaded = load(arguments.start)
    policy = loaded.policy.eval().requires_grad_(False)
    scenes = Scenes(arguments.scenes, loaded, arguments.instruction)
    known, frames = torch.where(scenes.known)[0], read(loaded, arguments.dataset)
    for view in range(1 + VIEWS):
        frames = frames.beside(scenes.frames(known, scenes.named[known], torch.full_like(known, view)))
    controller = Controller(Prefix(policy), frames)
    controller.mlp.requires_grad_(True)
    controller.norm.requires_grad_(True)
    train(controller, arguments.steps)
    with torch.no_grad():
        off = controller.off(torch.where(frames.held)[0])
    said = {"actions_off": round(float(off), 3), "steps": arguments.steps, "frames": int((~frames.held).sum())}
    said |= {"seconds": round(time.perf_counter() - start)}
    keep(policy, arguments, "control.json", said)


if __name__ == "__main__":
    main()
