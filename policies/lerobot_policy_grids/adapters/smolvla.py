"""SmolVLA: SigLIP -> pixel shuffle and linear connector -> [image tokens, language, state] -> trunk.

Modifications, from outside, of `lerobot/policies/smolvla` 0.6:
- `SmolVLAPolicy.prepare_images` also runs the vision tower, once for all cameras, and the reducer, and
  returns the k sampled tokens of each camera as if they were its image. There the whole batch is visible:
  instruction, robot state, camera keys.
- `SmolVLMWithExpertModel.embed_image` lets such tokens pass. It is called again in backward under gradient
  checkpointing, so it must not do the work itself.
Everything after that follows from the number of tokens: masks, positions, key-value cache.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from ..anchors import Region
from ..errors import UnsupportedPolicyError
from .base import Adapter, Prediction, Stages, refuse_second_attach
from .layout import TokenLayout
from .positions import keep_positions, release_positions
from .seam import Seam

TRUNK_LAYERS = ("forward_attn_layer", "forward_cross_attn_layer")


class SmolVLAAdapter(Adapter):
    """Adapter of SmolVLA and of every class derived from it."""

    resolution_field = "resize_imgs_with_padding"

    def layout(self, policy: Any) -> TokenLayout:
        config = policy.config
        vlm_config = policy.model.vlm_with_expert.config
        cell = vlm_config.vision_config.patch_size * vlm_config.scale_factor
        size = config.resize_imgs_with_padding
        if size is None:
            shapes = {tuple(feature.shape[-2:]) for feature in config.image_features.values()}
            if len(shapes) != 1:
                raise UnsupportedPolicyError(
                    f"cameras of different sizes {sorted(shapes)} without resize_imgs_with_padding; set it, so that "
                    "every camera gives the same token grid"
                )
            height, width = shapes.pop()
        else:
            width, height = size
        if height % cell or width % cell:
            raise UnsupportedPolicyError(
                f"images of {height} x {width} pixels are not a whole number of {cell}-pixel cells; "
                f"set resize_imgs_with_padding to multiples of {cell}"
            )
        if config.prefix_length > 0:
            raise UnsupportedPolicyError(
                f"prefix_length={config.prefix_length} pads the prefix back to its dense length, so no token would "
                "be saved; set prefix_length=-1"
            )
        return TokenLayout(
            token_grid=(height // cell, width // cell),
            width=vlm_config.text_config.hidden_size,
            cameras=tuple(config.image_features),
            language_width=vlm_config.text_config.hidden_size,
            state_width=config.max_state_dim,
            region=self.common_region(policy),
        )

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("prepare_images" in vars(policy))
        vlm = policy.model.vlm_with_expert
        # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
        policy.prepare_images = partial(_prepare_images, policy, seam)
        vlm.embed_image = partial(_embed_image, vlm)

    def attach_to_trunk(self, policy: Any, seam: Seam) -> None:
        from . import smolvla_trunk as trunk  # reducers know adapters

        vlm = policy.model.vlm_with_expert
        pruning = trunk.TrunkPruning(policy, seam)
        policy.prepare_images = partial(trunk.prepare_images, policy, pruning, policy.prepare_images)
        for name in TRUNK_LAYERS:
            setattr(vlm, name, partial(trunk.run_layer, pruning, partial(getattr(type(vlm), name), vlm)))

    def keep_positions(self, policy: Any, seam: Seam) -> None:
        keep_positions(policy.model.vlm_with_expert, seam, *special_tokens(policy))

    def detach(self, policy: Any) -> None:
        release_positions(policy.model.vlm_with_expert)
        vars(policy).pop("prepare_images", None)
        for name in ("embed_image", *TRUNK_LAYERS):
            vars(policy.model.vlm_with_expert).pop(name, None)

    def stages(self, policy: Any) -> Stages:
        vlm = policy.model.vlm_with_expert.get_vlm_model()
        return Stages(vlm.vision_model, vlm.connector, steps_field="num_steps", prefix="embed_prefix")

    def feature_source(self, policy: Any) -> nn.Module:
        connector: nn.Module = policy.model.vlm_with_expert.get_vlm_model().connector
        return connector

    def prediction(self, policy: Any) -> Prediction:
        return Prediction(policy.model.action_out_proj, "velocity")

    def image_region(self, policy: Any, height: int, width: int) -> Region:
        if policy.config.resize_imgs_with_padding is None:
            return 0.0, 0.0, 1.0, 1.0
        target_width, target_height = policy.config.resize_imgs_with_padding
        # LeRobot's resize_with_pad keeps the aspect ratio and pads on the left and on top.
        ratio = max(width / target_width, height / target_height)
        left = 1 - int(width / ratio) / target_width
        top = 1 - int(height / ratio) / target_height
        return left, top, 1.0, 1.0


def special_tokens(policy: Any) -> tuple[int, int]:
    """Tokens in front of and behind each camera's visual tokens in the prefix."""
    model = policy.model
    if not model.add_image_special_tokens:
        return 0, 0
    return len(model.global_image_start_token), len(model.image_end_token)


def _prepare_images(policy: Any, seam: Seam, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    images, masks = type(policy).prepare_images(policy, batch)
    vlm = policy.model.vlm_with_expert
    tokens = seam.tokens(images, batch, partial(type(vlm).embed_image, vlm), vlm.embed_language_tokens)
    return tokens, masks[: len(tokens)]


def _embed_image(vlm: Any, image: Tensor) -> Tensor:
    """Pass tokens [b, k, c] through; embed pixels [b, 3, h, w] as before."""
    tokens: Tensor = image if image.ndim == 3 else type(vlm).embed_image(vlm, image)
    return tokens
