"""π0, π0.5 and π0-FAST: SigLIP -> linear projector -> [image tokens, language, ...] -> Gemma.

Modifications, from outside, of `lerobot/policies/{pi0,pi05,pi0_fast}` 0.6, which share this seam:
- `policy._preprocess_images` also runs the vision tower, once for all cameras, and the reducer, and returns
  the k sampled features of each camera as if they were its image. There the whole batch is visible.
- `PaliGemmaModel.get_image_features` projects such features instead of running the tower. Sampling before the
  linear projector gives the same tokens for less: the map and an average commute.
- Cameras missing from the batch are left out. LeRobot sends a blank image through the tower and masks its tokens;
  nothing attends to them and they advance no position, so the result is the same.
Everything after that follows from the number of tokens: masks, positions, key-value cache, FAST decoding.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..anchors import Region
from . import pi0_trunk
from .base import Adapter, Prediction, Stages, centred_region, refuse_second_attach
from .layout import TokenLayout
from .positions import keep_positions, release_positions
from .seam import Seam


class PI0Adapter(Adapter):
    """Adapter of the three policies built on PaliGemma in openpi's way."""

    resolution_field = "image_resolution"

    def layout(self, policy: Any) -> TokenLayout:
        config = policy.config
        paligemma = _paligemma(policy)
        vision = paligemma.config.vision_config
        side = vision.image_size // vision.patch_size
        return TokenLayout(
            token_grid=(side, side),
            width=vision.hidden_size,
            cameras=tuple(config.image_features),
            language_width=paligemma.config.text_config.hidden_size,
            state_width=0 if config.robot_state_feature is None else config.max_state_dim,
            region=self.common_region(policy),
        )

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("_preprocess_images" in vars(policy))
        paligemma = _paligemma(policy)
        # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
        policy._preprocess_images = partial(_preprocess_images, policy, seam)
        paligemma.get_image_features = partial(_get_image_features, paligemma)

    def attach_to_trunk(self, policy: Any, seam: Seam) -> None:
        if hasattr(policy.config, "max_decoding_steps"):
            # Decoding runs the layers of the prefix again for each token.
            super().attach_to_trunk(policy, seam)
        pi0_trunk.attach(policy, seam)

    def keep_positions(self, policy: Any, seam: Seam) -> None:
        keep_positions(policy.model.paligemma_with_expert, seam, 0, 0)

    def detach(self, policy: Any) -> None:
        release_positions(policy.model.paligemma_with_expert)
        pi0_trunk.detach(policy)
        vars(policy).pop("_preprocess_images", None)
        vars(_paligemma(policy)).pop("get_image_features", None)

    def stages(self, policy: Any) -> Stages:
        decodes = hasattr(policy.config, "max_decoding_steps")
        return Stages(
            _paligemma(policy).vision_tower,
            _paligemma(policy).multi_modal_projector,
            steps_field="max_decoding_steps" if decodes else "num_inference_steps",
            prefix="embed_prefix_fast" if decodes else "embed_prefix",
            decodes=decodes,
        )

    def feature_source(self, policy: Any) -> nn.Module:
        tower: Any = _paligemma(policy).vision_tower
        source: nn.Module = getattr(tower, "vision_model", tower).post_layernorm
        return source

    def prediction(self, policy: Any) -> Prediction:
        if hasattr(policy.config, "max_decoding_steps"):
            return Prediction(policy.model.paligemma_with_expert.paligemma.lm_head, "logits")
        return Prediction(policy.model.action_out_proj, "velocity")

    def image_region(self, policy: Any, height: int, width: int) -> Region:
        return centred_region(height, width, *policy.config.image_resolution)

    def to_bfloat16(self, policy: Any) -> bool:
        policy.config.dtype = "bfloat16"
        # LeRobot's own conversion: vision, projector and norms stay float32.
        policy.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
        return True

    def checkpoint_names(self, policy: Any, names: list[str]) -> dict[str, str]:
        # LeRobot renames keys while it loads. Its function moves values about; here they are the names' numbers.
        numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
        renamed = policy._fix_pytorch_state_dict_keys(numbers, policy.config)
        return {
            name if name.startswith("model.") else f"model.{name}": names[int(number)]
            for name, number in renamed.items()
        }


def _paligemma(policy: Any) -> Any:
    return policy.model.paligemma_with_expert.paligemma.model


def _preprocess_images(policy: Any, seam: Seam, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    images, masks = type(policy)._preprocess_images(policy, batch)
    model = policy.model
    # As in the dense policy, the tower's activations are recomputed in backward if checkpointing is on.
    encode = partial(model._apply_checkpoint, partial(_run_tower, _paligemma(policy).vision_tower))
    tokens = seam.tokens(images, batch, encode, model.paligemma_with_expert.embed_language_tokens)
    return tokens, masks[: len(tokens)]


def _run_tower(tower: nn.Module, images: Tensor) -> Tensor:
    features: Tensor = tower(images).last_hidden_state
    return features


def _get_image_features(paligemma: Any, pixel_values: Tensor, **kwargs: Any) -> Any:
    """Project features [b, k, c]; treat pixels [b, 3, h, w] as before."""
    if pixel_values.ndim == 3:
        return BaseModelOutputWithPooling(pooler_output=paligemma.multi_modal_projector(pixel_values))
    return type(paligemma).get_image_features(paligemma, pixel_values, **kwargs)
