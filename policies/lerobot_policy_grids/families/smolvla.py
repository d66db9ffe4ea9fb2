"""SmolVLA: SigLIP -> pixel shuffle and linear connector -> [image tokens, language, state] -> trunk.

Modifications, from outside, of `lerobot/policies/smolvla`:
- `SmolVLAPolicy.prepare_images` also runs the vision tower, once for all cameras, and the reducer, and
  returns the k sampled tokens of each camera as if they were its image. There the whole batch is visible:
  instruction, robot state, camera keys.
- `SmolVLMWithExpertModel.embed_image` lets such tokens pass. It is called again in backward under gradient
  checkpointing, so it must not do the work itself.
Everything after that follows from the number of tokens: masks, positions, key-value cache.

A fast runtime acts in two phases, made of the modules of the policy: `phases.smolvla`.

To drop tokens inside the trunk (`attach_to_trunk`), `SmolVLMWithExpertModel.forward_attn_layer` and
`forward_cross_attn_layer` get the prefix that is left, and its rows and columns of positions and masks. `forward`
loops over the list of hidden states that it hands them, so what is put in that list is what goes on. Kept tokens keep
their position ids; the key-value cache of later layers holds only them.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedPolicyError
from ..reducers import TokenLayout
from ..reducers.anchors import WHOLE, Region
from ..reducers.blocks import join
from ..runtime import FastRuntime, Phases
from ..tiny import TINY_FOLDER, VLM_FOLDER, TinySmolVLAConfig
from .acting import Prepared, act_through
from .base import (
    DensePolicy,
    Family,
    Recipe,
    Stages,
    Target,
    image_size,
    lower_right_region,
    refuse_second_attach,
    replaced,
)
from .distances import action_distance
from .phases.smolvla import VISION, Prefill, Step
from .positions import keep_positions, release_positions
from .pruning import TrunkPruning, mean_attention, note_images
from .seam import Sampling, Seam
from .tower import Tower, release_tower

MODELS = frozenset(
    {
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    }
)
LAYERS = ("forward_attn_layer", "forward_cross_attn_layer")


class SmolVLA(Family):
    """SmolVLA and every class derived from it."""

    resolution_field = "resize_imgs_with_padding"
    extra = "smolvla"
    packages = ("transformers",)
    flow_steps = "num_steps"
    reference = "lerobot"
    steps: ClassVar = {"smolvla_new_line_processor": frozenset()}
    repositories: ClassVar = {"vlm_model_name": MODELS, "tokenizer_name": MODELS}

    def layout(self, policy: DensePolicy) -> TokenLayout:
        config = policy.config
        vlm_config = policy.model.vlm_with_expert.config
        cell = vlm_config.vision_config.patch_size * vlm_config.scale_factor
        size = config.resize_imgs_with_padding
        if size is None:
            shapes = {image_size(feature.shape) for feature in config.image_features.values()}
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
        cameras = self.cameras(policy)
        return TokenLayout(
            token_grid=(height // cell, width // cell),
            width=vlm_config.text_config.hidden_size,
            cameras=tuple(cameras),
            language_width=vlm_config.text_config.hidden_size,
            state_width=config.max_state_dim,
            regions=tuple(cameras.values()),
        )

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("prepare_images" in vars(policy))
        vlm = policy.model.vlm_with_expert
        # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
        policy.prepare_images = partial(_prepare_images, policy, seam)
        vlm.embed_image = partial(_embed_image, vlm)

    def detach(self, policy: Any) -> None:
        vlm = policy.model.vlm_with_expert
        release_positions(vlm)
        vars(policy).pop("prepare_images", None)
        for name in (*LAYERS, "embed_image"):
            vars(vlm).pop(name, None)
        release_tower(vlm.get_vlm_model().vision_model.encoder)
        vars(vlm.get_vlm_model().connector).pop("pixel_shuffle", None)

    def feature_source(self, policy: DensePolicy) -> nn.Module:
        connector: nn.Module = policy.model.vlm_with_expert.get_vlm_model().connector
        return connector

    def image_region(self, policy: DensePolicy, height: int, width: int) -> Region:
        if policy.config.resize_imgs_with_padding is None:
            return WHOLE
        target_width, target_height = policy.config.resize_imgs_with_padding
        return lower_right_region(height, width, target_height, target_width)

    def keep_positions(self, policy: DensePolicy, seam: Seam) -> None:
        keep_positions(policy.model.vlm_with_expert, seam, *_special_tokens(policy))

    def tower(self, policy: DensePolicy) -> Tower:
        vlm = policy.model.vlm_with_expert
        return Tower(
            vlm.get_vlm_model().vision_model.encoder, vlm.config.vision_config.hidden_size, vlm.config.scale_factor
        )

    def attach_to_tower(self, policy: Any, seam: Seam, after: int) -> None:
        super().attach_to_tower(policy, seam, after)
        connector = policy.model.vlm_with_expert.get_vlm_model().connector
        connector.pixel_shuffle = partial(_pixel_shuffle, connector, seam)

    def act_through(self, policy: Any, seam: Seam, runtime: FastRuntime) -> None:
        act_through(policy, seam, runtime, str(self.stages(policy).steps_field), partial(_reduce, policy, seam))

    @torch.no_grad()
    def phases(self, policy: Any, seam: Seam, cameras: list[int], steps: int) -> Phases:
        prefill, step = Prefill(policy, seam, cameras, _special_tokens(policy)), Step(policy, steps)
        return Phases(prefill, step, (policy.model.vlm_with_expert.vlm.lm_head,), vision=VISION)

    def attach_to_trunk(self, policy: Any, seam: Seam) -> None:
        vlm = policy.model.vlm_with_expert
        pruning = TrunkPruning(seam, vlm.num_vlm_layers)
        policy.prepare_images = partial(note_images, pruning, policy.prepare_images, *_special_tokens(policy))
        for name in LAYERS:
            setattr(vlm, name, partial(_run_layer, pruning, partial(getattr(type(vlm), name), vlm)))

    def target(self, policy: DensePolicy) -> Target:
        return Target(policy.model.action_out_proj, action_distance)

    def flow(self, policy: DensePolicy) -> nn.Module:
        model: nn.Module = policy.model
        return model

    def stages(self, policy: DensePolicy) -> Stages:
        vlm = policy.model.vlm_with_expert.get_vlm_model()
        return Stages(vlm.vision_model, vlm.connector, self.flow_steps, "embed_prefix")

    @contextmanager
    def offline(self, config: Any) -> Iterator[None]:
        with TemporaryDirectory() as folder:
            vlm = Path(folder) / "vlm"
            write_vlm(vlm)
            with replaced(config, vlm_model_name=str(vlm)):
                yield

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        from lerobot.policies.factory import get_policy_class

        config = TinySmolVLAConfig(device="cpu", input_features=inputs, output_features=outputs, **options)
        policy: Any = get_policy_class(config.type)(config)
        return policy

    def narrow(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        from lerobot.configs import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class

        if not folder.exists():
            write_vlm(folder, NARROW_SIZES)
        side = NARROW_SIZES["vision_config"]["image_size"]
        fields = {"vlm_model_name": str(folder), "load_vlm_weights": False, "resize_imgs_with_padding": (side, side)}
        config = PreTrainedConfig.get_choice_class("smolvla")(
            device="cpu", input_features=inputs, output_features=outputs, **(fields | options)
        )
        policy: Any = get_policy_class("smolvla")(config)
        return policy


class TinySmolVLA(SmolVLA):
    """SmolVLA's class at about a million parameters, whose tokenizer and sizes ship with this package."""

    steps: ClassVar = {
        **SmolVLA.steps,
        "tiny_smolvla_tokenizer": frozenset({"max_length", "task_key", "padding_side", "padding", "truncation"}),
    }
    # The second is no repository, but a folder of this package.
    repositories: ClassVar = {**SmolVLA.repositories, "vlm_model_name": MODELS | {"lerobot_policy_grids/tiny"}}

    @contextmanager
    def offline(self, config: Any) -> Iterator[None]:
        yield


FAMILIES = (
    SmolVLA(
        "smolvla",
        sources={"smolvla": "lerobot/smolvla_base"},
        # LeRobot's own preset for fine-tuning it.
        recipe=Recipe(steps=20_000, batch=64, micro_batch=64, lr=1e-4, warmup=0.05),
        image_size=512,
        language_tokens=48,
    ),
    TinySmolVLA(
        "tiny_smolvla",
        sources={
            "tiny": None,
            "tiny_metaworld": TINY_FOLDER / "metaworld",
            "tiny_libero": TINY_FOLDER / "libero",
        },
        recipe=Recipe(steps=2_000, batch=32, micro_batch=32, lr=8e-4, warmup=0.05),
        image_size=96,
        language_tokens=32,
    ),
)


# The seam.


def _special_tokens(policy: Any) -> tuple[int, int]:
    """Tokens in front of and behind each camera's visual tokens in the prefix."""
    model = policy.model
    if not model.add_image_special_tokens:
        return 0, 0
    return len(model.global_image_start_token), len(model.image_end_token)


def _prepare_images(policy: Any, seam: Seam, batch: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    images, masks = type(policy).prepare_images(policy, batch)
    if seam.acts_in_phases:
        return Prepared(images, batch), masks
    tokens = _reduce(policy, seam, Prepared(images, batch))
    return tokens, masks[: len(tokens)]


def _reduce(policy: Any, seam: Seam, prepared: Prepared) -> list[Tensor]:
    vlm = policy.model.vlm_with_expert
    return seam.tokens(prepared.images, prepared.batch, partial(_encode, vlm, seam), vlm.embed_language_tokens)


def _encode(vlm: Any, seam: Seam, images: Tensor, sample: Sampling | None = None) -> Tensor:
    with seam.sampling(sample):
        tokens: Tensor = type(vlm).embed_image(vlm, images)
    return tokens


def _pixel_shuffle(connector: Any, seam: Seam, states: Tensor, scale: int) -> Tensor:
    """Merge the patches of each token, which lie one after the other where they were sampled in the tower."""
    if seam.between is not None:
        return join(states, scale)
    merged: Tensor = type(connector).pixel_shuffle(connector, states, scale)
    return merged


def _embed_image(vlm: Any, image: Tensor) -> Tensor:
    """Pass tokens [b, k, c] through; embed pixels [b, 3, h, w] as before."""
    tokens: Tensor = image if image.ndim == 3 else type(vlm).embed_image(vlm, image)
    return tokens


# Dropping tokens inside the trunk.


def _run_layer(
    pruning: TrunkPruning,
    run: Any,
    model_layers: list[Any],
    inputs_embeds: list[Tensor | None],
    layer_idx: int,
    position_ids: Tensor,
    attention_mask: Tensor,
    batch_size: int,
    head_dim: int,
    past_key_values: Any = None,
    **options: Any,
) -> Any:
    """`forward_attn_layer` or `forward_cross_attn_layer` on what is left of the prefix."""
    prefix = inputs_embeds[0]
    if prefix is not None:
        if layer_idx == 0:
            pruning.start()
        if layer_idx == pruning.layers - 1:
            pruning.observe(_attention(model_layers[0][layer_idx], prefix, position_ids, attention_mask, head_dim))
        if layer_idx == pruning.layers:
            inputs_embeds[0] = pruning.prune(prefix)
    shortened = pruning.shortened(layer_idx)
    if shortened:
        attention_mask = pruning.take(attention_mask, -1)
        if prefix is not None:
            attention_mask = pruning.take(attention_mask, 1)
            position_ids = pruning.take(position_ids, 1)
    result = run(
        model_layers,
        inputs_embeds,
        layer_idx,
        position_ids,
        attention_mask,
        batch_size,
        head_dim,
        past_key_values=past_key_values,
        **options,
    )
    # LeRobot 0.6.0 keeps plain tensors there, and never the suffix.
    if shortened and prefix is None and hasattr(past_key_values, "layers"):
        # LeRobot takes the suffix out of the cache by cropping to the length of the whole prefix.
        past_key_values.layers[layer_idx].crop(pruning.kept_length)
    return result


@torch.no_grad()
def _attention(layer: Any, prefix: Tensor, positions: Tensor, mask: Tensor, head_dim: int) -> Tensor:
    """As `SmolVLMWithExpertModel.eager_attention_forward` weighs, float32 [b, p, p]."""
    from lerobot.policies.smolvla.smolvlm_with_expert import apply_rope

    size, length, _ = prefix.shape
    states = layer.input_layernorm(prefix).to(layer.self_attn.q_proj.weight.dtype)
    query, key = (
        apply_rope(project(states).view(size, length, -1, head_dim), positions[:, :length]).transpose(1, 2)
        for project in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    return mean_attention(query, key, mask[:, :length, :length], head_dim**-0.5)


# Real sizes without a network.

# Of HuggingFaceTB/SmolVLM2-500M-Video-Instruct.
SIZES: dict[str, Any] = {
    "scale_factor": 4,
    "text_config": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "vocab_size": 49280,
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
}


# The same layers with few channels, and small images. The tokenizer of this package has 640 words.
NARROW_SIZES: dict[str, Any] = {
    "scale_factor": 2,
    "text_config": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 16,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "image_size": 128,
        "patch_size": 16,
    },
}


def write_vlm(folder: Path, sizes: dict[str, Any] = SIZES) -> None:
    """Make a folder with what SmolVLA asks of its vision-language model: sizes, and a tokenizer."""
    shutil.copytree(VLM_FOLDER, folder)
    content: Any = json.loads((folder / "config.json").read_text())
    for name, value in sizes.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(content))
