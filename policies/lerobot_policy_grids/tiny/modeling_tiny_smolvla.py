"""TinySmolVLAPolicy: SmolVLA's own class around a small vision-language model.

It differs from SmolVLA in two ways, and needs both to learn from a hundred demonstrations: a convolutional stem
replaces the linear patch embedding, and the last layer of the language model is trainable, because the action expert
reads its keys and values.
"""

from copy import copy
from typing import Any, Self

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from torch import Tensor, nn

from .configuration_tiny_smolvla import TinySmolVLAConfig
from .tokenizer import VLM_FOLDER


class ConvStem(nn.Module):
    """Three strided convolutions over RGB and two coordinate channels: one token per 8 x 8 pixels.

    Args:
        width: C, channels of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(5, 32, 5, 2, 2),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.Conv2d(64, width, 3, 2, 1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Turn images [b, 3, h, w] in [-1, 1] into a feature map [b, c, h / 8, w / 8]."""
        batch, _, height, width = images.shape
        rows = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype)
        columns = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype)
        position = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        pixels = torch.cat([images, position.expand(batch, -1, -1, -1)], dim=1)
        # Faster on a CPU. Weights stay contiguous: LeRobot cannot save the optimiser state of channels-last weights.
        features: Tensor = self.layers(pixels.contiguous(memory_format=torch.channels_last))
        return features


class TinySmolVLAPolicy(SmolVLAPolicy):
    """LeRobot's SmolVLA with the small vision-language model of this package."""

    config_class = TinySmolVLAConfig
    name = "tiny_smolvla"

    def __init__(self, config: TinySmolVLAConfig, **kwargs: Any) -> None:
        # Not `replace`, which checks the device again and knows no "meta".
        local = copy(config)
        local.vlm_model_name, local.load_vlm_weights = str(VLM_FOLDER), False
        super().__init__(local, **kwargs)
        # The path is valid on this machine only, so the saved configuration keeps the name.
        self.config = self.model.config = config
        vlm = self.model.vlm_with_expert.get_vlm_model()
        vlm.vision_model.embeddings.patch_embedding = ConvStem(vlm.vision_model.config.hidden_size)
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
