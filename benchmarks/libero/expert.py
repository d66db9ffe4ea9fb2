"""Train the action expert of a small policy on demonstrations, on a trunk that stays as it is.

    python benchmarks/libero/expert.py DATASET outputs/libero/controlled outputs/libero/dense    # 24 minutes, two cores

`lerobot-grids fit` does the same with `train_expert_only=true`. Here the trunk reads every frame once instead of in
every step, which is about ten times as fast, and the reason why this is not `fit`.
"""

import argparse
import time
from pathlib import Path

import torch
from descent import descend, lower_precision
from labelled import Scenes
from prefix import Prefix
from recorded import Frames, read
from stage import keep
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from lerobot_grids.policies import load
from lerobot_policy_grids.families.distances import mean_where

RATE, BATCH = 1.5e-3, 64


class Memory:
    """What the layers of the action expert read of each frame, but for its keys and values."""

    def __init__(self, prefix: Prefix, frames: Frames) -> None:
        self.prefix, self.frames = prefix, frames
        read_parts = [self._read(index) for index in torch.arange(len(frames.state)).split(64)]
        self.inputs = [torch.cat(parts) for parts in zip(*read_parts, strict=True)]

    def embed(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of some frames before the first layer, and which exist."""
        frames = self.frames
        return self.prefix.embed(frames.seen[index], frames.words[index], frames.mask[index], frames.state[index])

    def _read(self, index: Tensor) -> list[Tensor]:
        """Tokens of some frames before each layer but the first, bfloat16."""
        with torch.no_grad(), lower_precision():
            tokens, exist = self.embed(index)
            inputs = []
            for number in range(len(self.prefix.layers) - 1):
                tokens = self.prefix.behind(number, tokens, exist)
                inputs.append(tokens.bfloat16())
        return inputs

    @torch.no_grad()
    def cache(self, index: Tensor) -> tuple[DynamicCache, Tensor]:
        """What a prefill of some frames would leave, and which tokens exist."""
        cache = DynamicCache()
        with lower_precision():
            first, exist = self.embed(index)
            for number, tokens in enumerate([first, *(part[index].float() for part in self.inputs)]):
                keys, values = self.prefix.keys_values(number, tokens, exist)
                cache.update(keys.float(), values.float(), number)
        return cache, exist


def flow_loss(memory: Memory, index: Tensor) -> Tensor:
    """SmolVLA's loss of some frames."""
    frames, model = memory.frames, memory.prefix.policy.model
    actions = frames.actions[index]
    width = actions.shape[-1]
    actions = functional.pad(actions, (0, model.config.max_action_dim - width))
    noise, moment = torch.randn_like(actions), model.sample_time(len(index), actions.device)
    mixed = moment[:, None, None] * noise + (1 - moment[:, None, None]) * actions
    cache, exist = memory.cache(index)
    with lower_precision():
        velocity = model.denoise_step(exist, cache, mixed, moment)
    error = (velocity.float() - (noise - actions)).square()[..., :width].mean(-1)
    return mean_where(error, ~frames.over[index])


def train(memory: Memory, steps: int) -> None:
    """Train the expert and the projections of actions."""
    shown = torch.where(~memory.frames.held)[0]

    def compute_loss() -> Tensor:
        return flow_loss(memory, shown[torch.randint(len(shown), (BATCH,))])

    policy = memory.prefix.policy
    for step, loss in descend(policy, compute_loss, steps=steps, rate=RATE, warmup=0.05, betas=(0.9, 0.95)):
        if step % 200 == 0:
            print(f"step {step}: loss {loss:.3f}, held out {held_out(memory):.3f}", flush=True)


@torch.no_grad()
def held_out(memory: Memory) -> float:
    """The loss of frames that are held out, always with the same noise."""
    held = torch.where(memory.frames.held)[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        some = held[torch.randperm(len(held))[:512]]
        return sum(flow_loss(memory, part).item() for part in some.split(BATCH)) / len(some.split(BATCH))


def main() -> None:
    """Train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="recorded demonstrations")
    parser.add_argument("start", type=Path, help="policy that control.py made")
    parser.add_argument("output", type=Path)
    parser.add_argument("--scenes", type=Path, nargs="*", default=[], help="files that scenes.py made")
    parser.add_argument("--instruction", default="pick up the {} and place it in the basket", help="of the scenes")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--every", type=int, default=2, help="train on every n-th frame; one takes 0.3 MB of memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    begin = time.perf_counter()
    loaded = load(arguments.start)
    policy = loaded.policy.eval()
    for name, weight in policy.named_parameters():
        weight.requires_grad_(name.startswith(("model.vlm_with_expert.lm_expert.", "model.action_")))
    frames = read(loaded, arguments.dataset)
    frames = frames.at(torch.arange(0, len(frames.state), arguments.every))
    if arguments.scenes:
        scenes = Scenes(arguments.scenes, loaded, arguments.instruction)
        shown = torch.where(scenes.known & ~scenes.held)[0]
        frames = frames.beside(scenes.frames(shown, scenes.named[shown], torch.zeros_like(shown)))
    memory = Memory(Prefix(policy), frames)
    train(memory, arguments.steps)
    # With fewer tokens the trunk has to read others, so later trainings change it, too.
    policy.config.train_expert_only = False
    said = {"steps": arguments.steps, "held_out": round(held_out(memory), 4)}
    said |= {"frames": int((~memory.frames.held).sum()), "seconds": round(time.perf_counter() - begin)}
    keep(policy, arguments, "expert.json", said)


if __name__ == "__main__":
    main()
