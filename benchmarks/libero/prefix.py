"""What a small policy on a frozen vision tower computes before its action expert, from stored outputs of the tower.

The tower sees every picture once instead of in every step, and PyTorch's own attention replaces LeRobot's, which keeps
all weights. `tests/benchmarks/test_libero_prefix.py` compares with LeRobot's own prefill.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from descent import lower_precision
from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from lerobot_policy_grids.tiny.modeling_tiny_smolvla import TinySmolVLAPolicy

# What a tower said of images, because three scripts ask the same one about the same images, for minutes.
KEPT = Path("outputs/libero/seen")


def see(policy: TinySmolVLAPolicy, images: Tensor, batch: int = 64) -> Tensor:
    """What the vision tower says of images; kept in a file, and read from there the next time.

    Args:
        policy: The policy.
        images: uint8 [n, cameras, 3, h, w].
        batch: Images at once.

    Returns:
        bfloat16 [n, cameras, tokens, c].
    """
    vision = policy.model.vlm_with_expert.get_vlm_model().vision_model.eval()
    content = hashlib.blake2b(images.contiguous().numpy(), digest_size=16)
    for weight in vision.state_dict().values():
        content.update(weight.contiguous().numpy())
    kept = KEPT / f"{content.hexdigest()}.safetensors"
    if not kept.is_file():
        seen = []
        with torch.no_grad(), lower_precision():
            for part in images.flatten(0, 1).split(batch):
                seen.append(vision(part.float() / 127.5 - 1).last_hidden_state.bfloat16())
        KEPT.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        save_file({"seen": torch.cat(seen).unflatten(0, images.shape[:2])}, partial)
        partial.replace(kept)
    return load_file(kept)["seen"]


class Prefix(nn.Module):
    """The language model of a policy, over visual tokens, words and the robot's state."""

    def __init__(self, policy: TinySmolVLAPolicy) -> None:
        super().__init__()
        self.policy, self.model = policy, policy.model.vlm_with_expert
        self.layers = self.model.get_vlm_model().text_model.layers
        self.width = self.model.config.text_config.hidden_size

    def embed(self, seen: Tensor, words: Tensor, mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that enter the first layer, [b, n, c], and which of them exist, bool [b, n].

        Args:
            seen: Outputs of the vision tower [b, cameras, tokens, c].
            words: int64 [b, words].
            mask: bool [b, words].
            state: Normalised states [b, d].
        """
        connector, scale = self.model.get_vlm_model().connector, self.width**0.5
        visual = connector(seen.float().flatten(0, 1)).unflatten(0, seen.shape[:2]).flatten(1, 2) * scale
        spoken = self.model.embed_language_tokens(words) * scale
        padded = functional.pad(state, (0, self.policy.config.max_state_dim - state.shape[-1]))
        robot = self.policy.model.state_proj(padded)[:, None]
        tokens = torch.cat([part.to(visual.dtype) for part in (visual, spoken, robot)], 1)
        ones = mask.new_ones(len(mask), 1)
        return tokens, torch.cat([ones.expand(-1, visual.shape[1]), mask, ones], 1)

    def keys_values(self, number: int, tokens: Tensor, exist: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each [b, heads, n, head]."""
        _, keys, values = self._heads(self.layers[number], tokens, exist.cumsum(1) - 1)
        return keys, values

    def behind(
        self, number: int, tokens: Tensor, exist: Tensor, robot_only: bool = False, places: Tensor | None = None
    ) -> Tensor:
        """The tokens behind a layer, [b, n, c], or the robot's token alone, [b, 1, c].

        Args:
            number: Of the layer.
            tokens: Before it, [b, n, c].
            exist: Which of them exist, bool [b, n].
            robot_only: Whether the others are not wanted.
            places: Of the tokens in the sequence, int64 [b, n]; None if all that exist are there.
        """
        layer = self.layers[number]
        queries, keys, values = self._heads(layer, tokens, exist.cumsum(1) - 1 if places is None else places)
        sees = exist[:, None].repeat(1, tokens.shape[1], 1)
        # Pictures and words do not see the robot's state.
        sees[:, :-1, -1] = False
        if robot_only:
            tokens, queries, sees = tokens[:, -1:], queries[:, :, -1:], sees[:, -1:]
        read = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=sees[:, None])
        tokens = tokens + layer.self_attn.o_proj(read.transpose(1, 2).flatten(2))
        out: Tensor = tokens + layer.mlp(layer.post_attention_layernorm(tokens))
        return out

    @staticmethod
    def _heads(layer: Any, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention, normed = layer.self_attn, layer.input_layernorm(tokens)
        queries, keys, values = (
            project(normed).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        turned = [apply_rope(queries, places), apply_rope(keys, places), values]
        queries, keys, values = (part.to(values.dtype).transpose(1, 2) for part in turned)
        return queries, keys, values
