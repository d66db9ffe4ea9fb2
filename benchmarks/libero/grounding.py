"""Teach the language model of a small policy which words mean which object, as a real VLM knows before it sees a robot.

    python benchmarks/libero/grounding.py outputs/libero/scenes.npz outputs/libero/start outputs/libero/grounded

The instruction names an object of the scene. Each visual token learns to say, behind the first layer and behind the
last one, whether that object is in its patch. The vision tower stays as it is, and the action expert is not touched. At
the end, in scenes that were left out: how often the token that says so most strongly is on the named object.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.smolvla.modeling_smolvla import make_att_2d_masks
from torch import Tensor, nn
from torch.nn import functional

from lerobot_policy_grids.tiny.modeling_tiny_smolvla import TinySmolVLAPolicy
from lerobot_policy_grids.tiny.tokenizer import TinyTokenizerStep

PATCH, HELD_OUT = 8, 0.1
# A token is on an object if so much of its patch shows it.
SHARE = 0.15
UNNAMED = ("background", "robot", "basket")


class Grounding(nn.Module):
    """The prefix of a policy, with a read-out of its visual tokens behind the first and behind the last layer."""

    def __init__(self, policy: TinySmolVLAPolicy) -> None:
        super().__init__()
        self.policy, self.model = policy, policy.model.vlm_with_expert
        width = self.model.config.text_config.hidden_size
        self.read = nn.ModuleList([nn.Linear(width, 1), nn.Linear(width, 1)])
        self._behind_first: Tensor | None = None
        second = self.model.get_vlm_model().text_model.layers[1]
        second.input_layernorm.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._behind_first = arguments[0]

    def forward(self, images: list[Tensor], words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [b, visual tokens] behind the first and the last layer.

        Args:
            images: One float [b, 3, h, w] from -1 to 1 for each camera.
            words: int64 [b, n].
            mask: bool [b, n].
        """
        count = len(words)
        state = torch.randn(count, self.policy.config.max_state_dim)
        seen = [torch.ones(count, dtype=torch.bool)] * len(images)
        prefix, pads, attention = self.policy.model.embed_prefix(images, seen, words, mask, state)
        (last, _), _ = self.model.forward(
            attention_mask=make_att_2d_masks(pads, attention),
            position_ids=torch.cumsum(pads, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[prefix, None],
            use_cache=True,  # as in a prefill, in which there is no action expert
        )
        visual = len(images) * (images[0].shape[-1] // PATCH) ** 2
        first = self._behind_first
        assert first is not None
        scores = [read(hidden[:, :visual])[..., 0] for read, hidden in zip(self.read, (first, last), strict=True)]
        return scores[0], scores[1]


class Scenes:
    """Labelled scenes with one or more cameras, and instructions that name an object of them."""

    def __init__(self, file: Path, cameras: int, instruction: str) -> None:
        content = np.load(file)
        self.images = torch.from_numpy(content["images"]).unflatten(0, (-1, cameras))
        self.classes = [str(name) for name in content["classes"]]
        labels = torch.from_numpy(content["labels"]).unflatten(0, (-1, cameras))
        # Share of each patch that shows each class, [scenes, visual tokens of all cameras, classes].
        patches = labels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(4).flatten(1, 3)
        self.shares = torch.stack([(patches == kind).float().mean(-1) for kind in range(len(self.classes))], -1)
        visible = (self.shares > SHARE).any(1)
        visible[:, [number for number, name in enumerate(self.classes) if name in UNNAMED]] = False
        self.visible = visible.float()
        texts = [instruction.format(name.replace("_", " ")) + "\n" for name in self.classes]
        coded = TinyTokenizerStep().input_tokenizer(texts, padding=True, return_tensors="pt")
        self.words, self.mask = coded["input_ids"], coded["attention_mask"].bool()

    def batch(self, index: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """(images, words, mask, whether each token is on the named object [b, n]); the object is drawn."""
        named = torch.multinomial(self.visible[index], 1)[:, 0]
        images = self.images[index].permute(1, 0, 4, 2, 3).float() / 127.5 - 1
        gain = torch.empty(len(index), 1, 1, 1).uniform_(0.8, 1.2)
        shift = torch.empty_like(gain).uniform_(-0.15, 0.15)
        jittered = [(view * gain + shift).clamp(-1, 1) for view in images]
        on = self.shares[index, :, named] > SHARE
        return jittered, self.words[named], self.mask[named], on


def train(grounding: Grounding, scenes: Scenes, index: Tensor, steps: int, batch: int = 32) -> None:
    """Train the trunk and the read-outs."""
    weights = [value for value in grounding.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    rare = torch.tensor(20.0)
    for step in range(steps):
        images, words, mask, on = scenes.batch(index[torch.randint(len(index), (batch,))])
        truth = on.float()
        losses = [
            functional.binary_cross_entropy_with_logits(scores, truth, pos_weight=rare)
            for scores in grounding(images, words, mask)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def point(grounding: Grounding, scenes: Scenes, index: Tensor) -> dict[str, Any]:
    """How often the strongest token is on the named object, behind the first and the last layer."""
    hits: list[list[bool]] = [[], []]
    for part in index.repeat(4).split(40):
        images, words, mask, on = scenes.batch(part)
        for found, scores in zip(hits, grounding(images, words, mask), strict=True):
            found += on.gather(1, scores.argmax(1, keepdim=True))[:, 0].tolist()
    rates = [round(sum(found) / len(found), 3) for found in hits]
    return {"points_at_named": dict(zip(("first_layer", "last_layer"), rates, strict=True)), "questions": len(hits[0])}


def main() -> None:
    """Train, point, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path)
    parser.add_argument("start", type=Path, help="policy that tower.py made")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--instruction", default="pick up the {} and place it in the basket")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    begin = time.perf_counter()
    policy = TinySmolVLAPolicy.from_pretrained(arguments.start)
    scenes = Scenes(arguments.scenes, len(policy.config.image_features), arguments.instruction)
    held = torch.arange(len(scenes.images)) % round(1 / HELD_OUT) == 0
    grounding = Grounding(policy)
    train(grounding, scenes, torch.arange(len(held))[~held], arguments.steps)
    seen = point(grounding.eval(), scenes, torch.arange(len(held))[held])
    print(json.dumps(seen, indent=2))
    shutil.copytree(arguments.start, arguments.output, dirs_exist_ok=True)
    policy.save_pretrained(arguments.output)
    seen |= {"steps": arguments.steps, "scenes": int((~held).sum()), "seconds": round(time.perf_counter() - begin)}
    (arguments.output / "grounding.json").write_text(json.dumps(seen, indent=2) + "\n")


if __name__ == "__main__":
    main()
