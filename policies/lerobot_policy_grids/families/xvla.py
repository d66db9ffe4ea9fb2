"""X-VLA: DaViT -> [mean token, H x W tokens] per view -> view 0 and the text through BART -> action transformer.

The other views go to the action transformer directly. Modifications, from outside, of `lerobot/policies/xvla`, from
LeRobot 0.6.1 on:
- `XVLAPolicy._build_model_inputs` also runs the vision tower, once for all cameras, and the reducer; what it returns as
  the images are `Views`. There the whole batch is visible: instruction, state, camera keys, which views are empty.
- `Florence2MultiModalProjector.forward` gives the reducer the cells before they are projected and normalised, and
  projects what the reducer chose. A mean of normalised tokens is shorter than any of them; a normalised mean is as
  long as the others, and the trunk knows such: the mean token is one. It is no cell, and stays in front as it is.
- `XVLAModel.forward_vlm` hands view 0 to LeRobot's own function as if it were the only one, and puts the others behind.
- `Florence2Model.get_image_features` lets such tokens pass.
- With dense positions, the default, `SoftPromptedTransformer.forward` adds other rows of `pos_emb`: see `dense_rows`.
Views that the batch lacks are tokens of zeros in LeRobot, and attended to. So they are here, as many as of a real view.

A fast runtime acts in two phases, and `XVLAModel.generate_actions` is its loop: `phases.xvla`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lerobot.utils.constants import ACTION, OBS_IMAGES
from torch import Tensor, nn

from ..errors import UnsupportedPolicyError
from ..reducers import TokenLayout
from ..reducers.anchors import WHOLE, Region
from ..runtime import FastRuntime, Phases
from .acting import Prepared
from .base import DensePolicy, Family, Recipe, Stages, Target, lower_right_region, refuse_second_attach
from .characters import CHARACTERS, write_character_tokenizer
from .phases.xvla import VISION, Prefill, Step, generate_actions
from .position_embeddings import BART_OFFSET, dense_rows, places_of_views
from .seam import Seam

# Sizes of Florence-2-large, from which X-VLA-0.9B was trained. LeRobot reads them from a checkpoint's config.json.
FLORENCE2_LARGE: dict[str, Any] = {
    "vision_config": {
        "depths": (1, 1, 9, 1),
        "embed_dim": (256, 512, 1024, 2048),
        "num_heads": (8, 16, 32, 64),
        "num_groups": (8, 16, 32, 64),
        "window_size": 12,
        "projection_dim": 1024,
        "max_position_embeddings": 50,
        "max_temporal_embeddings": 100,
        "drop_path_rate": 0.1,
    },
    "text_config": {
        "model_type": "bart",
        "vocab_size": 51289,
        "d_model": 1024,
        "max_position_embeddings": 1024,
        "encoder_layers": 12,
        "encoder_ffn_dim": 4096,
        "encoder_attention_heads": 16,
        # LeRobot drops the decoder, but builds it first.
        "decoder_layers": 1,
        "decoder_ffn_dim": 4096,
        "decoder_attention_heads": 16,
        "dropout": 0.1,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
}


@dataclass
class Views:
    """What takes the place of the pixels [b, views, 3, h, w] between LeRobot's own functions.

    Attributes:
        tokens: Of each real view [b, t, c], not projected yet; t may differ.
        empty: How many views behind them hold nothing.
        coordinates: Of each real view float32 [b, k, 2], where positions are to be the dense ones.
    """

    tokens: list[Tensor]
    empty: int
    coordinates: list[Tensor] | None = None

    def to(self, *args: Any, **kwargs: Any) -> "Views":
        """LeRobot brings pixels to the model's precision; the tower's output has it."""
        return self


class XVLA(Family):
    """X-VLA on Florence-2."""

    resolution_field = "resize_imgs_with_padding"
    extra = "xvla"
    packages = ("transformers",)
    flow_steps = "num_denoising_steps"
    # Without a state LeRobot gives it zeros.
    reads_state = False
    camera_prefix = f"{OBS_IMAGES}."
    # Its dense policy counts views with `.item()`; `finish` keeps that mask off the meta device.
    counted_on_meta = True
    # What it denoises are actions, and no velocities.
    exports = False
    steps: ClassVar = {
        "xvla_image_to_float": frozenset({"image_keys", "validate_range"}),
        "xvla_image_scale": frozenset({"image_keys"}),
        "xvla_imagenet_normalize": frozenset({"image_keys"}),
        "xvla_add_domain_id": frozenset({"domain_id"}),
        "xvla_rotation_6d_to_axis_angle": frozenset({"expected_action_dim"}),
    }
    repositories: ClassVar = {"tokenizer_name": frozenset({"facebook/bart-large"})}

    def layout(self, policy: DensePolicy) -> TokenLayout:
        if not hasattr(policy.model.vlm, "multi_modal_projector"):
            raise UnsupportedPolicyError(
                "this LeRobot builds X-VLA from code of its own, where tokens cannot be sampled; install LeRobot 0.6.1 "
                "or newer"
            )
        config, vlm = policy.config, policy.model.vlm.config
        cell = math.prod(vlm.vision_config.patch_stride)
        height, width = self._image_size(config)
        if height % cell or width % cell:
            raise UnsupportedPolicyError(
                f"images of {height} x {width} pixels are not a whole number of {cell}-pixel cells; "
                f"set resize_imgs_with_padding to multiples of {cell}"
            )
        cameras = self.cameras(policy)
        return TokenLayout(
            token_grid=(height // cell, width // cell),
            width=vlm.vision_config.embed_dim[-1],
            cameras=tuple(cameras),
            language_width=vlm.text_config.d_model,
            state_width=config.max_state_dim if config.use_proprio else 0,
            regions=tuple(cameras.values()),
            extra_tokens=1,
        )

    @staticmethod
    def _image_size(config: Any) -> tuple[int, int]:
        if config.resize_imgs_with_padding is not None:
            height, width = config.resize_imgs_with_padding
            return height, width
        # A blank image stands for an empty camera, of whatever size the others are.
        shapes = {
            tuple(feature.shape[-2:]) for key, feature in config.image_features.items() if "empty_camera" not in key
        }
        if len(shapes) != 1:
            raise UnsupportedPolicyError(
                f"cameras of different sizes {sorted(shapes)} without resize_imgs_with_padding; set it, so that "
                "every camera gives the same token grid"
            )
        height, width = shapes.pop()
        return height, width

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("_build_model_inputs" in vars(policy))
        model, vlm = policy.model, policy.model.vlm
        projector = vlm.multi_modal_projector
        # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
        policy._build_model_inputs = partial(_build_model_inputs, policy, seam)
        model.forward_vlm = partial(_forward_vlm, model, seam.layout.token_grid)
        vlm.get_image_features = partial(_get_image_features, vlm)
        projector.forward = partial(_project, projector)

    def keep_positions(self, policy: Any, seam: Seam) -> None:
        config, layout = policy.config, seam.layout
        views = config.num_image_views or len(config.image_features)
        per_view = layout.extra_tokens + layout.num_dense_tokens
        length = config.chunk_size + views * per_view + config.tokenizer_max_length
        if length > config.max_len_seq:
            raise UnsupportedPolicyError(
                f"with every visual token the sequence has {length} tokens, but max_len_seq={config.max_len_seq}: some "
                "have no position there; use consecutive positions"
            )
        seam.remember_coordinates()
        transformer = policy.model.transformer
        transformer.forward = partial(_forward_transformer, transformer)

    def detach(self, policy: Any) -> None:
        model, vlm = policy.model, policy.model.vlm
        vars(policy).pop("_build_model_inputs", None)
        vars(model).pop("forward_vlm", None)
        vars(vlm).pop("get_image_features", None)
        vars(vlm.multi_modal_projector).pop("forward", None)
        vars(model.transformer).pop("forward", None)

    def feature_source(self, policy: Any) -> nn.Module:
        projector: nn.Module = policy.model.vlm.multi_modal_projector
        return projector

    def image_region(self, policy: Any, height: int, width: int) -> Region:
        size = policy.config.resize_imgs_with_padding
        return WHOLE if size is None else lower_right_region(height, width, *size)

    def act_through(self, policy: Any, seam: Seam, runtime: FastRuntime) -> None:
        seam.runtime = runtime
        policy.model.generate_actions = partial(generate_actions, policy, seam, runtime, partial(_reduce, policy, seam))

    @torch.no_grad()
    def phases(self, policy: Any, seam: Seam, cameras: list[int], steps: int) -> Phases:
        return Phases(Prefill(policy, seam, cameras, steps, _project), Step(policy.model), vision=VISION)

    def to_bfloat16(self, policy: Any) -> bool:
        policy.config.dtype = "bfloat16"
        policy.model._apply_dtype()
        return True

    def checkpoint_names(self, policy: DensePolicy, names: list[str]) -> dict[str, str]:
        from lerobot.policies.xvla import modeling_xvla

        # LeRobot renames keys of published checkpoints while it loads, and moves values about; here each value is the
        # number of its name, in two equal columns.
        numbers = {name: torch.tensor([[number, number]]) for number, name in enumerate(names)}
        if modeling_xvla._is_vendored_florence_state_dict(numbers):
            numbers = modeling_xvla._remap_vendored_florence_state_dict(numbers)
        return {name: names[int(number.flatten()[0])] for name, number in numbers.items()}

    def checkpoint_value(self, source: str, value: Tensor) -> Tensor:
        # Florence-2's own code keeps the projection as a plain matrix, which a linear layer has transposed.
        return value.T if source.endswith("image_projection") else value

    def target(self, policy: DensePolicy) -> Target:
        transformer = policy.model.transformer
        distance = partial(_distance, policy.model.action_space)
        # Dropout of the encoder draws before LeRobot draws noise and time.
        return Target(transformer.action_decoder, distance, noise=(transformer, ("action_with_noise", "t")))

    def stages(self, policy: DensePolicy) -> Stages:
        vlm = policy.model.vlm
        return Stages(vlm.vision_tower, vlm.multi_modal_projector, self.flow_steps, "forward_vlm")

    def prefix_length(self, prefix: Any) -> int:
        return int(prefix["vlm_features"].shape[1] + prefix["aux_visual_inputs"].shape[1])

    def config(self, inputs: dict[str, Any], outputs: dict[str, Any], size: int, dtype: str) -> Any:
        from lerobot.policies.xvla.configuration_xvla import XVLAConfig

        return XVLAConfig(
            device="cpu",
            input_features=inputs,
            output_features=outputs,
            resize_imgs_with_padding=(size, size),
            florence_config=FLORENCE2_LARGE,
            action_mode="auto",
            dtype=dtype,
        )

    def finish(self, policy: Any) -> None:
        # On the meta device masks have no values: which views are real is known, and BART's mask is all ones.
        if next(policy.parameters()).is_meta:
            policy._prepare_images = partial(_prepare_images_on_meta, policy)
            policy.model.vlm.language_model.encoder.register_forward_pre_hook(_without_mask, with_kwargs=True)

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        from lerobot.policies.xvla.configuration_xvla import XVLAConfig
        from lerobot.policies.xvla.modeling_xvla import XVLAPolicy

        fields: dict[str, Any] = {
            "florence_config": _small_florence(len(VOCABULARY)),
            "tokenizer_name": str(write_character_tokenizer(folder / "bart", VOCABULARY)),
            "tokenizer_max_length": 8,
            "resize_imgs_with_padding": (64, 64),
            "chunk_size": 8,
            "n_action_steps": 8,
            "hidden_size": 32,
            "depth": 2,
            "num_heads": 2,
            "num_domains": 2,
            "len_soft_prompts": 4,
            "dim_time": 8,
            "max_len_seq": 256,
            "action_mode": "auto",
            "max_action_dim": 8,
            "max_state_dim": 8,
            "num_denoising_steps": 3,
        }
        policy = XVLAPolicy(
            XVLAConfig(device="cpu", input_features=inputs, output_features=outputs, **fields | options)
        )
        for module in policy.modules():
            # The action transformer's dropout is no option of its configuration.
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for table in (policy.model.transformer.pos_emb, policy.model.vlm.language_model.encoder.embed_positions.weight):
            # As large as what it is added to, so that a wrong row shows.
            nn.init.normal_(table, std=0.3)
        return policy

    def narrow(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        florence = _small_florence(len(VOCABULARY))
        florence["vision_config"]["depths"] = FLORENCE2_LARGE["vision_config"]["depths"]
        florence["text_config"]["encoder_layers"] = FLORENCE2_LARGE["text_config"]["encoder_layers"]
        fields = {"depth": 24, "chunk_size": 32, "n_action_steps": 32, "num_denoising_steps": 10}
        fields |= {"len_soft_prompts": 32, "tokenizer_max_length": 64, "max_len_seq": 512}
        return self.small(inputs, outputs, folder, **fields | {"florence_config": florence} | options)


FAMILIES = (
    XVLA(
        "xvla",
        sources={"xvla": "lerobot/xvla-base"},
        # LeRobot's own preset for fine-tuning it.
        recipe=Recipe(steps=20_000, batch=64, micro_batch=8, lr=1e-4, warmup=0.05),
        image_size=224,
        language_tokens=64,
    ),
)


def _distance(space: Any, student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """How far apart two predictions are, as an action space weighs actions.

    Where it takes a gripper for a probability, that is the divergence of the student's from the teacher's.

    Args:
        space: The policy's action space.
        student: Actions [b, steps, c].
        teacher: The same shape.
        batch: Holds the actions [b, steps, action_dim], and perhaps `action_is_pad` [b, steps].
    """
    student, teacher = student.float(), teacher.float().detach()
    counts = torch.zeros_like(student, dtype=torch.bool)
    counts[..., : batch[ACTION].shape[-1]] = True
    pad = batch.get("action_is_pad")
    if pad is not None:
        counts &= ~pad[..., None]
    # The gradient is zero where both are equal.
    student = torch.where(counts, student, teacher)
    goal = teacher
    if _grips_by_logits(space, teacher):
        goal = teacher.clone()
        goal[..., space.gripper_idx] = goal[..., space.gripper_idx].sigmoid()
    apart = sum(space.compute_loss(student, goal).values()) - sum(space.compute_loss(teacher, goal).values())
    share: Any = 1.0 if pad is None else (~pad).float().mean().clamp_min(1 / pad.numel())
    distance: Tensor = apart / share
    return distance


def _grips_by_logits(space: Any, like: Tensor) -> bool:
    """Whether an action space predicts a gripper's logit: its loss against a probability of 0.5 is then least at 0."""
    if not space.gripper_idx:
        return False
    guess = like.new_zeros(1, 1, like.shape[-1])
    goal = guess.clone()
    goal[..., space.gripper_idx] = 0.5
    with torch.enable_grad():
        guess.requires_grad_()
        (slope,) = torch.autograd.grad(sum(space.compute_loss(guess, goal).values()), guess)
    return not bool(slope.any())


# Of the small tokenizer.
VOCABULARY = ("<pad>", "</s>", "<s>", "<unk>", *CHARACTERS)


def _small_florence(vocabulary: int) -> dict[str, Any]:
    """A Florence-2 of cells of 8 pixels."""
    return {
        "vision_config": {
            "depths": (1, 1, 1, 1),
            "embed_dim": (8, 16, 24, 32),
            "num_heads": (1, 2, 2, 2),
            "num_groups": (1, 2, 2, 2),
            "patch_stride": (4, 2, 1, 1),
            "window_size": 4,
            "projection_dim": 32,
            "max_position_embeddings": 20,
            "max_temporal_embeddings": 4,
            "drop_path_rate": 0.0,
        },
        "text_config": {
            "model_type": "bart",
            "vocab_size": vocabulary,
            "d_model": 32,
            "max_position_embeddings": 256,
            "encoder_layers": 2,
            "encoder_ffn_dim": 64,
            "encoder_attention_heads": 2,
            "decoder_layers": 1,
            "decoder_ffn_dim": 64,
            "decoder_attention_heads": 2,
            "dropout": 0.0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
    }


def _build_model_inputs(policy: Any, seam: Seam, batch: dict[str, Tensor]) -> dict[str, Any]:
    inputs: dict[str, Any] = type(policy)._build_model_inputs(policy, batch)
    prepared = Prepared(list(inputs["image_input"].unbind(1)), batch)
    return inputs | {"image_input": prepared if seam.acts_in_phases else _reduce(policy, seam, prepared)}


def _reduce(policy: Any, seam: Seam, prepared: Prepared) -> Views:
    vlm = policy.model.vlm
    tokens = seam.tokens(prepared.images, prepared.batch, partial(_encode, vlm), vlm.get_input_embeddings())
    # Empty where the reducer was not called.
    coordinates = list(seam.coordinates or []) or None
    return Views(tokens, len(prepared.images) - len(tokens), coordinates)


def _encode(vlm: Any, images: Tensor) -> Tensor:
    return _project(vlm.multi_modal_projector, vlm.vision_tower(images).last_hidden_state)


def _project(projector: Any, features: Tensor) -> Tensor:
    """A map [n, c, h, w] to the mean of its cells and the cells, with positions; such tokens [b, t, c] to projected."""
    if features.ndim == 3:
        projected: Tensor = projector.image_proj_norm(projector.image_projection(features))
        return projected
    cells = (features + projector.image_position_embed(features)).flatten(2).transpose(1, 2)
    cells = cells + projector.visual_temporal_embed(cells[:, :1])
    return torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)


def _get_image_features(vlm: Any, tokens: Tensor, **kwargs: Any) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=vlm.multi_modal_projector(tokens))


def _forward_vlm(
    model: Any, token_grid: tuple[int, int], input_ids: Tensor, pixel_values: Views, image_mask: Tensor
) -> dict[str, Any]:
    first, *others = pixel_values.tokens
    empty = max(view.shape[1] for view in pixel_values.tokens)
    segments: list[int | Tensor] = []
    if pixel_values.coordinates is not None:
        main, *aside = places_of_views(pixel_values.coordinates, pixel_values.empty, empty, token_grid)
        segments = [main, input_ids.shape[1]]
    # On the CPU, so that counting the real views waits for nothing.
    real = torch.ones(len(first), 1, dtype=torch.bool, device="cpu")
    with _rows_of_bart(model.vlm.language_model.encoder.embed_positions, segments, token_grid, len(first)):
        encoded: dict[str, Any] = type(model).forward_vlm(model, input_ids, first[:, None], real)
    features = encoded["vlm_features"]
    aside_tokens = model.vlm.multi_modal_projector(torch.cat(others, dim=1)) if others else features[:, :0]
    zeros = aside_tokens.new_zeros(len(first), pixel_values.empty * empty, aside_tokens.shape[-1])
    encoded["aux_visual_inputs"] = torch.cat([aside_tokens, zeros], dim=1)
    if segments:
        table = model.transformer.pos_emb[0]
        encoded["positions"] = dense_rows(table, [model.chunk_size, *segments, *aside], token_grid, len(first))
    return encoded


@contextmanager
def _rows_of_bart(
    embed: nn.Module, segments: Sequence[int | Tensor], token_grid: tuple[int, int], batch: int
) -> Iterator[None]:
    """In this block BART's encoder adds the rows of the dense sequence, where there are segments."""
    if not segments:
        yield
        return
    rows = dense_rows(embed.weight[BART_OFFSET:], segments, token_grid, batch)  # type: ignore[index]
    handle = embed.register_forward_hook(lambda *args: rows)
    try:
        yield
    finally:
        handle.remove()


class _WithPositions:
    """The action transformer with another table of positions, which is all that its `forward` sees of it."""

    def __init__(self, transformer: Any, rows: Tensor) -> None:
        self.transformer, self.pos_emb = transformer, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transformer, name)


def _forward_transformer(transformer: Any, *args: Any, positions: Tensor | None = None, **kwargs: Any) -> Tensor:
    owner = transformer if positions is None else _WithPositions(transformer, positions)
    actions: Tensor = type(transformer).forward(owner, *args, **kwargs)
    return actions


def _prepare_images_on_meta(policy: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    images, masks = type(policy)._prepare_images(policy, batch)
    real = sum(key in batch for key in policy.config.image_features)
    return images, (torch.arange(masks.shape[1], device="cpu") < real).repeat(masks.shape[0], 1)


def _without_mask(encoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"attention_mask": None}
