"""TinySmolVLAPolicy: SmolVLA's own class around a small vision-language model.

It differs from SmolVLA in two ways, and needs both to learn from a hundred demonstrations: convolutions replace the
linear patch embedding, and the last layer of the language model is trainable, because the action expert reads its keys
and values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any, Self

import torch
from lerobot.policies.smolvla import smolvlm_with_expert
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn
from transformers import AutoConfig

from .configuration_tiny_smolvla import TinySmolVLAConfig
from .tokenizer import VLM_FOLDER


class ConvStem(nn.Module):
    """Convolutions over RGB and two coordinate channels: one token per patch of p x p pixels.

    Args:
        width: C, channels of a token.
        patch: p, 8, 12 or 16.
    """

    def __init__(self, width: int, patch: int = 8) -> None:
        super().__init__()
        # What is left of the patch behind the first two strides.
        stride = patch // 4
        self.layers = self.build(width, nn.Conv2d(64, width, 2 * stride - 1, stride, stride - 1))

    def build(self, width: int, last: nn.Conv2d) -> nn.Sequential:
        """Three strided convolutions; with a patch of 8 a token knows 17 x 17 pixels and the image's statistics."""
        return nn.Sequential(
            nn.Conv2d(5, 32, 5, 2, 2),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            last,
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Turn images [b, 3, h, w] in [-1, 1] into a feature map [b, c, h / p, w / p]."""
        batch, _, height, width = images.shape
        rows = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype)
        columns = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype)
        position = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        pixels = torch.cat([images, position.expand(batch, -1, -1, -1)], dim=1)
        # Faster on a CPU. Weights stay contiguous: LeRobot cannot save the optimiser state of channels-last weights.
        features: Tensor = self.layers(pixels.contiguous(memory_format=torch.channels_last))
        return features


class LocalStem(ConvStem):
    """A deeper stem without any statistics of the image: what a token says comes from 29 x 29 pixels around it with a
    patch of 8, and from 37 x 37 with one of 12.
    """

    def build(self, width: int, last: nn.Conv2d) -> nn.Sequential:
        """Five convolutions, and two layers of each token on its own."""
        return nn.Sequential(
            nn.Conv2d(5, 32, 5, 2, 2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 1, 1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1, 1),
            nn.ReLU(),
            last,
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, width, 1),
        )


class TinySmolVLAPolicy(SmolVLAPolicy):
    """LeRobot's SmolVLA with the small vision-language model of this package."""

    config_class = TinySmolVLAConfig
    name = "tiny_smolvla"

    def __init__(self, config: TinySmolVLAConfig, **kwargs: Any) -> None:
        # Not `replace`, which checks the device again and knows no "meta".
        local = copy(config)
        local.vlm_model_name, local.load_vlm_weights = str(VLM_FOLDER), False
        with _shaped_as(config):
            super().__init__(local, **kwargs)
        # The path is valid on this machine only, so the saved configuration keeps the name.
        self.config = self.model.config = config
        vlm = self.model.vlm_with_expert.get_vlm_model()
        vision = vlm.vision_model
        stem = LocalStem if config.vision_tower == "local" else ConvStem
        vision.embeddings.patch_embedding = stem(vision.config.hidden_size, config.patch_size)
        if config.vision_tower == "local":
            vision.encoder.layers = nn.ModuleList()
        if config.freeze_vision_encoder:
            vision.requires_grad_(False)
        if not config.train_expert_only:
            # Only the weights that the expert reads: an unused trainable weight would stop distributed training.
            last = vlm.text_model.layers[-1]
            for module in (last.input_layernorm, last.self_attn.k_proj, last.self_attn.v_proj):
                module.requires_grad_(True)
        self.to(config.device)

    @classmethod
    def _load_as_safetensor(cls, model: Self, model_file: str, map_location: str, strict: bool) -> Self:
        # With strict=False LeRobot would keep random weights where the file has none.
        loaded: Self = super()._load_as_safetensor(model, model_file, map_location, strict=True)
        return loaded


@contextmanager
def _shaped_as(policy: TinySmolVLAConfig) -> Iterator[None]:
    """In this block LeRobot reads a vision-language model's configuration with a policy's patch and layers."""

    def read(name: str) -> Any:
        config: Any = AutoConfig.from_pretrained(name)
        config.text_config.num_hidden_layers = policy.language_layers
        vision = config.vision_config
        vision.image_size = vision.image_size // vision.patch_size * policy.patch_size
        vision.patch_size = policy.patch_size
        return config

    smolvlm_with_expert.AutoConfig = SimpleNamespace(from_pretrained=read)
    try:
        yield
    finally:
        smolvlm_with_expert.AutoConfig = AutoConfig
