r"""Train a vision tower on labelled scenes, and put it into a dense policy that the rest of the study starts from.

    python benchmarks/libero/tower.py outputs/libero/scenes.npz --dataset outputs/libero/object \
        --output outputs/libero/start    # 20 minutes, one core

Each token learns to name the object in the middle of its patch, where that object's centre is, and how it lies. It
sees no instruction, no action and no recorded episode. At the end the same is read out from single tokens of scenes
that were left out: how often they name the object. The dataset gives the names and statistics of states and actions.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from descent import descend
from labelled import HELD_OUT, read_scenes
from lerobot.configs import FeatureType
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor, nn
from torch.nn import functional

from lerobot_grids.data import load_metadata
from lerobot_policy_grids.processor_grids import make_processors
from lerobot_policy_grids.tiny import TinySmolVLAConfig
from lerobot_policy_grids.tiny.modeling_tiny_smolvla import TinySmolVLAPolicy

# Visual tokens of a camera along each side.
GRID = 12
# Offsets of a centre are counted up to this distance, in patches.
NEAR = 4.0


def targets(labels: np.ndarray, patch: int) -> tuple[Tensor, Tensor]:
    """What tokens have to say of label images uint8 [n, h, w].

    Returns:
        kinds int64 [n, h / patch, w / patch]: the commonest class in the middle of each patch, half as high and wide;
        shapes float32 [n, h / patch, w / patch, 4]: offset (x, y) in patches to the centre of that class's pixels, and
        the cosine and sine of twice the angle at which they lie, times how elongated they are.
    """
    count, height, width = labels.shape
    rows, columns = height // patch, width // patch
    middle = slice(patch // 4, patch - patch // 4)
    pixels = labels.reshape(count, rows, patch, columns, patch)[:, :, middle, :, middle].transpose(0, 1, 3, 2, 4)
    kinds = torch.from_numpy(pixels.reshape(count, rows, columns, -1).astype(np.int64)).mode(-1).values
    shapes = torch.zeros(count, rows, columns, 4)
    centres = np.stack(np.meshgrid(np.arange(columns) + 0.5, np.arange(rows) + 0.5), -1)
    for number in range(count):
        for kind in np.unique(labels[number])[1:]:
            at = np.argwhere(labels[number] == kind)[:, ::-1] / patch
            covariance = np.cov(at.T) if len(at) > 2 else np.eye(2)
            spread = max(covariance[0, 0] + covariance[1, 1], 1e-6)
            lie = [(covariance[0, 0] - covariance[1, 1]) / spread, 2 * covariance[0, 1] / spread]
            values = np.concatenate([at.mean(0) - centres, np.broadcast_to(lie, centres.shape)], -1)
            mask = kinds[number] == int(kind)
            shapes[number][mask] = torch.from_numpy(values).float()[mask]
    return kinds, shapes.clamp(-NEAR, NEAR)


class Tower(nn.Module):
    """The vision tower of a policy, with a linear read-out."""

    def __init__(self, policy: TinySmolVLAPolicy, classes: int) -> None:
        super().__init__()
        self.vision = policy.model.vlm_with_expert.get_vlm_model().vision_model
        self.read = nn.Linear(self.vision.config.hidden_size, classes + 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(class scores [b, n, c], shapes [b, n, 4]) of images uint8 [b, h, w, 3]."""
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        out = self.read(self.vision(pixels).last_hidden_state)
        return out[..., :-4], out[..., -4:]


def brighten(images: Tensor) -> Tensor:
    """Other brightness and contrast for each image."""
    gain = torch.empty(len(images), 1, 1, 1).uniform_(0.8, 1.2)
    return ((images.float() - 128) * gain + 128 + torch.empty_like(gain).uniform_(-20, 20)).clamp(0, 255)


def train(tower: Tower, images: Tensor, kinds: Tensor, shapes: Tensor, steps: int, batch: int = 32) -> None:
    """Train the tower and its read-out."""
    rarity = 1 / torch.bincount(kinds.flatten(), minlength=int(kinds.max()) + 1).float().clamp_min(1).sqrt()

    def compute_loss() -> Tensor:
        index = torch.randint(len(images), (batch,))
        scores, read = tower(brighten(images[index]))
        kind, shape = kinds[index].flatten(1), shapes[index].flatten(1, 2)
        named = functional.cross_entropy(scores.flatten(0, 1), kind.flatten(), rarity / rarity.mean())
        seen = kind > 0
        return named + (read[seen] - shape[seen]).abs().mean()

    for step, loss in descend(tower, compute_loss, steps=steps, rate=2e-3):
        if step % 200 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)


@torch.no_grad()
def read_out(tower: Tower, images: Tensor, kinds: Tensor, shapes: Tensor, classes: list[str]) -> dict[str, Any]:
    """How well single tokens name objects and place their centres."""
    outputs = [tower(part) for part in images.float().split(50)]
    scores, read = (torch.cat(parts).flatten(0, 1) for parts in zip(*outputs, strict=True))
    truth, shape = kinds.flatten(), shapes.flatten(0, 2)
    right, off = scores.argmax(-1) == truth, (read - shape)[:, :2].norm(dim=-1)
    each = {name: round(right[truth == number].float().mean().item(), 3) for number, name in enumerate(classes)}
    return {"named": each, "off_patches": round(off[truth > 1].mean().item(), 3), "tokens": int((truth > 0).sum())}


def main() -> None:
    """Train, read out, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, nargs="+", help="files that scenes.py made")
    parser.add_argument("--dataset", required=True, help="recorded demonstrations")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--start", type=Path, help="policy whose weights are trained further; default: random ones")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    drawn, classes = read_scenes(arguments.scenes)
    images = drawn["images"].flatten(0, 1)
    size = images.shape[1]
    if size % GRID:
        parser.error(f"images of {size} pixels do not fall into {GRID} x {GRID} patches; draw scenes of 144 pixels")
    patch = size // GRID
    kinds, shapes = targets(drawn["labels"].flatten(0, 1).numpy(), patch)
    meta = load_metadata(arguments.dataset)
    features = dataset_to_policy_features(meta.features)
    config = TinySmolVLAConfig(
        input_features={name: f for name, f in features.items() if name.startswith("observation.")},
        output_features={name: f for name, f in features.items() if f.type is FeatureType.ACTION},
        resize_imgs_with_padding=(size, size),
        vision_tower="local",
        patch_size=patch,
        language_layers=4,
        device="cpu",
        push_to_hub=False,
    )
    policy = TinySmolVLAPolicy.from_pretrained(arguments.start) if arguments.start else TinySmolVLAPolicy(config)
    tower = Tower(policy, len(classes))
    # Whole scenes, from both cameras.
    held = torch.arange(len(images)) // drawn["images"].shape[1] % HELD_OUT == 0
    train(tower, images[~held], kinds[~held], shapes[~held], arguments.steps)
    seen = read_out(tower.eval(), images[held], kinds[held], shapes[held], classes)
    print(json.dumps(seen, indent=2))
    # The study keeps the tower as it is.
    policy.config.freeze_vision_encoder = True
    policy.save_pretrained(arguments.output)
    for processor in make_processors(policy.config, dataset_stats=meta.stats):
        processor.save_pretrained(arguments.output)
    seen |= {"steps": arguments.steps, "images": int((~held).sum()), "seconds": round(time.perf_counter() - start)}
    (arguments.output / "tower.json").write_text(json.dumps(seen, indent=2) + "\n")


if __name__ == "__main__":
    main()
