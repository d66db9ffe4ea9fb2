"""MolmoAct2: pooled patches -> placeholders in the prompt -> a language model, whose keys and values an expert reads.

Modifications, from outside, of `lerobot/policies/molmoact2`, from LeRobot 0.6.1 on:
- `MolmoAct2Policy._model_inputs`, where the whole batch is visible, also runs the vision tower, once for all cameras,
  and the reducer, and cuts the prompt: ids, attention mask and the types that make image tokens see each other.
- `MolmoAct2Model.merge_visual_inputs` and `build_input_embeddings` take tokens in the place of patches. LeRobot adds
  features to the embeddings of their placeholders, and so does this.
- `MolmoAct2Policy.predict_action_chunk` enters LeRobot's own autocast before the inputs are prepared, because the tower
  runs there now. It acts by the flow, also where `inference_action_mode` is not set.
- `MolmoAct2Policy._discrete_loss_from_backbone_outputs` cuts the labels of action tokens, for `action_mode=both`.
- With dense positions the rotary embedding of the language model gets fractions of positions, too.
The pre-processor stretches each image to a square, as published checkpoints have it: one crop, without column tokens.
27 patches are pooled to 14 tokens, so the last row and column of tokens see one patch where the others see two. Points
are drawn as if they saw two.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor, nn

from ..errors import TokenGridError, UnsupportedPolicyError
from ..reducers import TokenLayout
from ..reducers.anchors import WHOLE, Region
from .base import DensePolicy, Family, Recipe, Stages, Target, refuse_second_attach, replaced
from .characters import CHARACTERS, write_character_tokenizer
from .distances import mean_where
from .positions import cell_numbers
from .published_qwen import Published
from .qwen import FRACTIONS
from .seam import Seam, present_cameras
from .written_once import written_once

# Patches along each side that become one token. No field of the model's configuration has it.
POOLED = 2
# What the pre-processor makes of images.
PATCHES = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
# What it writes of a prompt, [b, l] each.
PROMPT = ("input_ids", "attention_mask", "token_type_ids")
PUBLISHED = ("MolmoAct2", "MolmoAct2-DROID", "MolmoAct2-BimanualYAM", "MolmoAct2-SO100_101", "MolmoAct2-LIBERO")
# Sizes of the published checkpoints: with these a file of bfloat16 weights has the size that the published one has.
MOLMOACT2_5B: dict[str, Any] = {
    "image_start_token_id": 154624,
    "image_end_token_id": 154625,
    "image_patch_id": 154626,
    "image_col_id": 154627,
    "vit_config": {"image_num_pos": 729, "attn_implementation": "sdpa"},
    "adapter_config": {
        "pooling_attention_mask": True,
        "intermediate_size": 9728,
        "text_hidden_size": 2560,
        "attn_implementation": "sdpa",
    },
    "text_config": {
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 154624,
        "additional_vocab_size": 128,
        "qkv_bias": False,
        "num_hidden_layers": 36,
        "intermediate_size": 9728,
        "max_position_embeddings": 16384,
        "rope_theta": 5000000.0,
        "use_qk_norm": True,
        "qk_norm_type": "qwen3",
        "attn_implementation": "sdpa",
    },
    "action_expert_config": {"hidden_size": 768, "num_layers": 36, "num_heads": 8, "mlp_ratio": 4.0},
}
# Of the small instance. Images of 60 pixels have 15 x 15 patches, which become 8 x 8 tokens.
PATCH, SIDE, HORIZON, STATES = 4, 60, 8, 16


class MolmoAct2(Family):
    """MolmoAct2 on Molmo2-ER, with an action expert that has a layer for each of the language model's."""

    resolution_field = None
    extra = "molmoact2"
    packages = ("transformers",)
    flow_steps = "num_inference_steps"
    counted_on_meta = True
    writes_state = True
    steps: ClassVar = {
        "molmoact2_masked_normalizer": frozenset({"eps", "features", "norm_map", "normalize_observation_keys"}),
        "molmoact2_masked_unnormalizer": frozenset({"eps", "features", "norm_map", "normalize_observation_keys"}),
        "molmoact2_clamp_normalized": frozenset({"normalization_masks"}),
        "molmoact2_clamp_action": frozenset(),
        "molmoact2_state_frame_transform": frozenset({"joint_signs", "joint_offsets"}),
        "molmoact2_action_frame_transform": frozenset({"joint_signs", "joint_offsets"}),
        "molmoact2_pack_inputs": frozenset(
            {
                *("checkpoint_path", "checkpoint_revision", "checkpoint_force_download", "action_mode"),
                *("discrete_action_tokenizer", "image_keys", "allow_image_key_fallback", "setup_type", "control_mode"),
                *("normalize_language", "add_setup_tokens", "add_control_tokens", "num_state_tokens"),
                *("max_sequence_length", "chunk_size", "max_action_dim", "env_action_dim"),
            }
        ),
    }
    repositories: ClassVar = {
        "checkpoint_path": frozenset(f"allenai/{name}" for name in PUBLISHED),
        "discrete_action_tokenizer": frozenset({"allenai/MolmoAct2-FAST-Tokenizer"}),
    }

    def model(self, policy: Any) -> Any:
        return policy._hf_model()

    def layout(self, policy: Any) -> TokenLayout:
        _refuse(policy.config)
        sizes = policy._backbone().config
        height, width = (-(-patches // POOLED) for patches in sizes.vit_config.image_num_patch)
        cameras = self.cameras(policy)
        return TokenLayout(
            token_grid=(height, width),
            width=sizes.text_config.hidden_size,
            cameras=tuple(cameras),
            language_width=sizes.text_config.hidden_size,
            # As wide as its actions may be, so that a reducer fits another robot, too.
            state_width=max(policy.config.expected_max_action_dim, policy.config.robot_state_feature.shape[0]),
            regions=tuple(cameras.values()),
        )

    def cameras(self, policy: DensePolicy) -> dict[str, Region]:
        # In the order in which the pre-processor puts their images into the prompt.
        found, keys = super().cameras(policy), policy.config.image_keys
        if strange := [name for name in keys if name not in found]:
            raise UnsupportedPolicyError(
                f"image_keys has {', '.join(strange)}, and the cameras in input_features are {', '.join(found)}; "
                "correct image_keys"
            )
        return {name: found[name] for name in keys or found}

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("_model_inputs" in vars(policy))
        backbone, cut = policy._backbone(), _Cut()
        # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
        policy._model_inputs = partial(_model_inputs, policy, seam, cut, False)
        policy.predict_action_chunk = partial(_predict_action_chunk, policy)
        policy._discrete_loss_from_backbone_outputs = partial(_discrete_loss, policy, cut)
        backbone.merge_visual_inputs = partial(_merge_visual_inputs, backbone)
        backbone.build_input_embeddings = partial(_build_input_embeddings, backbone)

    def keep_positions(self, policy: Any, seam: Seam) -> None:
        seam.remember_coordinates()
        cut = policy._model_inputs.args[2]
        policy._model_inputs = partial(_model_inputs, policy, seam, cut, True)
        for rotary in _rotary(policy):
            rotary.forward = partial(_rotate, rotary, cut)

    def detach(self, policy: Any) -> None:
        for owner, names in (
            (policy, ("_model_inputs", "predict_action_chunk", "_discrete_loss_from_backbone_outputs")),
            (policy._backbone(), ("merge_visual_inputs", "build_input_embeddings")),
            *((rotary, ("forward",)) for rotary in _rotary(policy)),
        ):
            for name in names:
                vars(owner).pop(name, None)

    def feature_source(self, policy: Any) -> nn.Module:
        tower: nn.Module = policy._backbone().vision_backbone
        return tower

    def image_region(self, policy: DensePolicy, height: int, width: int) -> Region:
        return WHOLE

    @contextmanager
    def without_weights(self, config: Any) -> Iterator[None]:
        from lerobot.policies.molmoact2 import modeling_molmoact2 as lerobots

        with replaced(
            lerobots,
            _resolve_checkpoint_location=_fetch_sizes,
            MolmoAct2ForConditionalGeneration=_Unloaded(lerobots.MolmoAct2ForConditionalGeneration),
            _strict_load_safetensors_weights=_load_nothing,
        ):
            yield

    def to_bfloat16(self, policy: Any) -> bool:
        policy.config.model_dtype = "bfloat16"
        policy.model.bfloat16()
        return True

    def target(self, policy: Any) -> Target:
        return Target(policy._action_expert().final_layer, _distance)

    def stages(self, policy: Any) -> Stages:
        tower = policy._backbone().vision_backbone
        return Stages(tower, tower.image_projector, self.flow_steps, "model.build_input_embeddings")

    def count_steps(self, policy: Any) -> int:
        # LeRobot's configuration may leave it to the checkpoint.
        return int(policy.config.num_inference_steps or policy._backbone().config.flow_matching_num_steps)

    def set_steps(self, policy: Any, steps: int) -> None:
        super().set_steps(policy, steps)
        # What LeRobot keeps of the steps' times is a part of the first chunk's cost, and not of the next one's.
        policy._action_expert()._modulation_cache_key = None

    def finish(self, policy: Any) -> None:
        if next(policy.parameters()).is_meta:
            backbone = policy._backbone()
            policy.forward = _no_training_step
            backbone.generate_actions_from_inputs = partial(_without_autocast, backbone)

    def complete(self, policy: Any, batch: dict[str, Any]) -> dict[str, Any]:
        sizes, layout = policy._backbone().config, self.layout(policy)
        count, words = batch[OBS_LANGUAGE_TOKENS].shape
        images, device = count * len(layout.cameras), batch[OBS_LANGUAGE_TOKENS].device
        # What is counted stays on the CPU beside the meta device, where nothing has a value.
        place = torch.device("cpu") if device.type == "meta" else device
        image = [
            sizes.image_start_token_id,
            *[sizes.image_patch_id] * layout.num_dense_tokens,
            sizes.image_end_token_id,
        ]
        ids = torch.tensor([[*image * len(layout.cameras), *[7] * words]] * count, device=place)
        rows, columns = sizes.vit_config.image_num_patch
        height, width = layout.token_grid
        padded = torch.full((height * POOLED, width * POOLED), -1, device=place)
        padded[:rows, :columns] = torch.arange(rows * columns, device=place).view(rows, columns)
        pooling = padded.view(height, POOLED, width, POOLED).transpose(1, 2).reshape(-1, POOLED**2)
        whole = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": (ids == sizes.image_patch_id).long(),
            "pixel_values": torch.rand(images, rows * columns, 3 * sizes.vit_config.image_patch_size**2, device=device),
            "image_token_pooling": pooling.repeat(images, 1),
            "image_grids": torch.tensor([[height, width, 0, 0]] * images, device=place),
            "image_num_crops": torch.ones(images, dtype=torch.long, device=place),
        }
        if (action := batch.get(ACTION)) is not None:
            rest = sizes.max_action_dim - action.shape[-1]
            whole[ACTION] = nn.functional.pad(action, (0, rest))
            real = torch.zeros_like(action[:, 0], dtype=torch.bool)
            whole["action_dim_is_pad"] = nn.functional.pad(real, (0, rest), value=True)
            whole["action_horizon_is_pad"] = torch.zeros_like(action[..., 0], dtype=torch.bool)
        return batch | whole

    def config(self, inputs: dict[str, Any], outputs: dict[str, Any], size: int, dtype: str) -> Any:
        if size != self.image_size:
            raise UnsupportedPolicyError(
                f"MolmoAct2 sees images of {self.image_size} pixels, not {size}; drop --resolution"
            )
        config: Any = super().config(inputs, outputs, size, dtype)
        config.action_mode = config.inference_action_mode = "continuous"
        config.model_dtype = dtype
        return config

    @contextmanager
    def offline(self, config: Any) -> Iterator[None]:
        from lerobot.policies.molmoact2 import modeling_molmoact2 as lerobots

        # A folder is not looked for on the Hub.
        with (
            TemporaryDirectory() as folder,
            replaced(config, checkpoint_path=folder),
            replaced(lerobots, HFMolmoAct2Config=Published(partial(lerobots.HFMolmoAct2Config, **MOLMOACT2_5B))),
        ):
            yield

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        from lerobot.policies.molmoact2.configuration_molmoact2 import MolmoAct2Config
        from lerobot.policies.molmoact2.modeling_molmoact2 import MolmoAct2Policy

        fields: dict[str, Any] = {
            "checkpoint_path": str(write_small_checkpoint(folder / "molmoact2")),
            "action_mode": "continuous",
            "inference_action_mode": "continuous",
            "chunk_size": HORIZON,
            "n_action_steps": HORIZON,
            "setup_type": "an arm",
            "control_mode": "joints",
            "num_state_tokens": STATES,
            "num_flow_timesteps": 2,
            "num_inference_steps": 3,
            "model_dtype": "float32",
            "enable_inference_cuda_graph": False,
        }
        config = MolmoAct2Config(device="cpu", input_features=inputs, output_features=outputs, **fields | options)
        policy = MolmoAct2Policy(config)
        # LeRobot makes its table of positions when it first acts, which would look like memory that a test did not see.
        policy._backbone().transformer.prepare_rope_cache(device="cpu")
        return policy


FAMILIES = (
    MolmoAct2(
        "molmoact2",
        # LeRobot begins with Ai2's own checkpoint, which is none of LeRobot's.
        sources={"molmoact2": None},
        # LeRobot's own preset.
        recipe=Recipe(steps=100_000, batch=32, micro_batch=4, lr=1e-5, warmup=0.002),
        image_size=378,
        # LeRobot's own budgets for what a prompt always says, and for the instruction.
        language_tokens=112,
    ),
)


@dataclass
class _Cut:
    """What was left of the last prompt.

    Attributes:
        keep: Bool [b, l], the dense tokens that are left; None before the first prompt.
        positions: float32 [b, l'] of the tokens that are left; None where they are numbered one after the other.
    """

    keep: Tensor | None = None
    positions: Tensor | None = None

    def cut(self, values: Tensor) -> Tensor:
        """What belongs to the tokens that are left, of values [b, l]."""
        assert self.keep is not None
        return values[self.keep].unflatten(0, (len(self.keep), -1))


class _Unloaded:
    """In the place of the class of the model: the same with random weights.

    Args:
        kind: The class.
    """

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def from_pretrained(self, location: str, config: Any, dtype: torch.dtype, **kwargs: Any) -> Any:
        return self.kind._from_config(config, dtype=dtype)


def _fetch_sizes(checkpoint_path: str, *, revision: str | None = None, force_download: bool = False) -> str:
    """A folder with a checkpoint's configuration and statistics, without its weights."""
    if Path(checkpoint_path).expanduser().exists():
        return str(Path(checkpoint_path).expanduser())
    from huggingface_hub import snapshot_download

    return snapshot_download(
        checkpoint_path, revision=revision, force_download=force_download, allow_patterns=["*.json"]
    )


def _load_nothing(model: Any, location: str) -> None:
    pass


def _refuse(config: Any) -> None:
    """Raise the error of a configuration with which a reducer could not work, or would not learn."""
    if config.enable_knowledge_insulation:
        raise UnsupportedPolicyError(
            "enable_knowledge_insulation=true cuts the gradient of the actions before the visual tokens, so a reducer "
            "would not learn from them; set it to false"
        )
    for name in ("action_mode", "inference_action_mode"):
        if getattr(config, name) == "discrete":
            raise UnsupportedPolicyError(
                f"{name}=discrete: a 'molmoact2' policy with fewer tokens acts by its flow only; set {name}=continuous"
            )
    if config.norm_tag and not config.image_keys and len(config.image_features) > 1:
        raise UnsupportedPolicyError(
            f"norm_tag={config.norm_tag}: LeRobot then takes the order of the cameras from the checkpoint, or from the "
            "dataset if it has statistics; name them in that order in image_keys"
        )


def _rotary(policy: Any) -> list[Any]:
    """The rotary embeddings of the language model."""
    transformer = policy._backbone().transformer
    several = transformer.config.rope_scaling_layers is not None
    return list(transformer.rotary_embs.values()) if several else [transformer.rotary_emb]


def _model_inputs(policy: Any, seam: Seam, cut: _Cut, dense: bool, batch: dict[str, Any]) -> dict[str, Any]:
    inputs: dict[str, Any] = type(policy)._model_inputs(policy, batch)
    if policy.training:
        # LeRobot keeps what it makes of the steps' times when it acts, and would use it after the weights have changed.
        policy._action_expert()._modulation_cache_key = None
    layout, backbone, ids = seam.layout, policy._backbone(), inputs["input_ids"]
    sizes, cells = backbone.config, layout.num_dense_tokens
    # With a camera missing, the pre-processor sorts the others by name.
    present = [layout.cameras[number] for number in present_cameras(layout.cameras, batch)]
    prompted = present if len(present) == len(layout.cameras) else sorted(present)
    is_image = ids == sizes.image_patch_id
    _require_grid(layout, inputs["image_grids"], len(ids), len(present), bool((ids == sizes.image_col_id).any()))
    images, pooling = type(backbone).merge_visual_inputs(
        backbone, input_ids=ids, **{name: inputs.pop(name) for name in PATCHES}
    )
    # The instruction is behind the images.
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    said = mask.bool() & (is_image.cumsum(1) == is_image.sum(1, keepdim=True)) & ~is_image & ~_told(sizes, ids)
    known = {**dict.fromkeys(present, ids), **batch, OBS_LANGUAGE_TOKENS: ids, OBS_LANGUAGE_ATTENTION_MASK: said}
    places = [prompted.index(name) for name in present]
    encode = partial(_encode, backbone.vision_backbone, pooling, places)
    tokens = seam.tokens([images[:, place] for place in places], known, encode, backbone.transformer.wte)
    order = [present.index(name) for name in prompted]
    tokens = [tokens[camera] for camera in order]
    cut.keep, cut.positions = torch.ones_like(is_image), None
    if seam.reducer is not None:
        limits = torch.tensor([camera.shape[1] for camera in tokens], device=ids.device)
        number = is_image.cumsum(1) - 1
        cut.keep = ~is_image | (number % cells < limits[(number // cells).clamp(0, len(tokens) - 1)])
    if dense and seam.coordinates:
        coordinates = [seam.coordinates[camera] for camera in order]
        cut.positions = _dense_positions(cut, is_image, coordinates, layout.token_grid)
    left = {name: cut.cut(inputs[name]) for name in PROMPT if name in inputs}
    return inputs | left | {"pixel_values": torch.cat(tokens, dim=1).flatten(0, 1)}


def _require_grid(layout: TokenLayout, grids: Tensor, samples: int, cameras: int, has_columns: bool) -> None:
    expected = [*layout.token_grid, 0, 0]
    found = [list(grid) for grid in {tuple(grid) for grid in grids.tolist()}]
    if found != [expected] or len(grids) != samples * cameras or has_columns:
        columns = ", with column tokens" if has_columns else ""
        raise TokenGridError(
            f"{samples} samples of {cameras} cameras have {len(grids)} images with the grids of tokens "
            f"{found}{columns}, expected {expected} without column tokens; use a checkpoint whose "
            "processor_config.json has crop_mode=resize and use_single_crop_col_tokens=false, and send what the "
            "pre-processor wrote of these cameras"
        )


def _told(sizes: Any, ids: Tensor) -> Tensor:
    """Which tokens are no words of the instruction: the state, which a reducer gets as numbers, and an answer."""
    told = torch.zeros_like(ids, dtype=torch.bool)
    if (first := sizes.state_token_start_id) is not None:
        told |= (ids >= first) & (ids < first + sizes.num_state_tokens)
    if sizes.action_start_token_id is not None:
        told |= (ids == sizes.action_start_token_id).cumsum(1) > 0
    return told


def _encode(tower: nn.Module, pooling: Tensor, places: list[int], images: Tensor) -> Tensor:
    """Patches [cameras * b, p, d] to tokens [cameras * b, H * W, c].

    The tower sees them sample by sample and as they are in the prompt, as in the dense policy.
    """
    by_place = images.unflatten(0, (len(places), -1))[[places.index(place) for place in range(len(places))]]
    features: Tensor = tower(by_place.transpose(0, 1).contiguous(), pooling)
    by_sample = features.unflatten(0, (len(pooling), len(places), -1))
    return by_sample[:, places].transpose(0, 1).flatten(0, 1)


def _dense_positions(cut: _Cut, is_image: Tensor, coordinates: list[Tensor], token_grid: tuple[int, int]) -> Tensor:
    """The positions float32 [b, l'] that the tokens which are left have among all tokens.

    Args:
        cut: Says which are left.
        is_image: Bool [b, l], the dense placeholders.
        coordinates: float32 [b, k, 2] of each image in the prompt.
        token_grid: (H, W).
    """
    everywhere = torch.arange(is_image.shape[1], device=is_image.device).expand(is_image.shape).float()
    # Of the first cell of each image.
    first = everywhere[is_image].view(len(is_image), len(coordinates), -1)[..., 0]
    cells = [(cell_numbers(camera, token_grid) * FRACTIONS).round() / FRACTIONS for camera in coordinates]
    placed = torch.cat([cell + first[:, [number]] for number, cell in enumerate(cells)], dim=1)
    return cut.cut(everywhere).masked_scatter(cut.cut(is_image), placed)


def _rotate(rotary: Any, cut: _Cut, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of fractional positions, by the sums of angles: LeRobot has a table of whole ones."""
    if cut.positions is None or cut.positions.shape[-1] != position_ids.shape[-1]:
        cosines, sines = type(rotary).forward(rotary, x, position_ids)
        return cosines, sines
    whole = cut.positions.floor()
    # All that is read of the states is where they are, and their precision.
    cosines, sines = type(rotary).forward(rotary, x[..., :1].float(), whole.long())
    frequencies, _ = rotary.rope_init_fn(rotary.config, x.device)
    angles = (cut.positions - whole)[..., None] * frequencies
    cosine, sine = torch.cat([angles, angles], dim=-1).cos(), torch.cat([angles, angles], dim=-1).sin()
    return (cosines * cosine - sines * sine).to(x.dtype), (sines * cosine + cosines * sine).to(x.dtype)


def _merge_visual_inputs(backbone: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
    if pixel_values is None or pixel_values.ndim > 2:
        return type(backbone).merge_visual_inputs(backbone, pixel_values=pixel_values, **kwargs)
    return pixel_values, None


def _build_input_embeddings(
    backbone: Any, input_ids: Tensor, images: Tensor | None = None, token_pooling: Tensor | None = None
) -> Any:
    if images is None or token_pooling is not None:
        return type(backbone).build_input_embeddings(backbone, input_ids, images, token_pooling)
    is_image = (input_ids == backbone.config.image_patch_id)[..., None]
    handle = backbone.transformer.wte.register_forward_hook(partial(_add, is_image, images))
    try:
        return type(backbone).build_input_embeddings(backbone, input_ids)
    finally:
        handle.remove()


def _add(is_image: Tensor, tokens: Tensor, module: nn.Module, args: Any, embeddings: Tensor) -> Tensor:
    return embeddings + torch.zeros_like(embeddings).masked_scatter(is_image, tokens.to(embeddings.dtype))


def _discrete_loss(policy: Any, cut: _Cut, batch: dict[str, Any], outputs: Any, reduction: str = "mean") -> Any:
    if batch.get("labels") is not None:
        batch = {**batch, "labels": cut.cut(batch["labels"])}
    return type(policy)._discrete_loss_from_backbone_outputs(policy, batch, outputs, reduction=reduction)


def _predict_action_chunk(policy: Any, batch: dict[str, Any], **kwargs: Any) -> Tensor:
    mode = kwargs.get("inference_action_mode") or policy.config.inference_action_mode or "continuous"
    if mode != "continuous":
        raise UnsupportedPolicyError(
            f"inference_action_mode={mode}: a 'molmoact2' policy with fewer tokens acts by its flow only; set "
            "inference_action_mode=continuous"
        )
    with _autocast(policy):
        chunk: Tensor = type(policy).predict_action_chunk(policy, batch, **kwargs | {"inference_action_mode": mode})
    return chunk


def _no_training_step(*args: Any, **kwargs: Any) -> Any:
    raise UnsupportedPolicyError(
        "a training step of a 'molmoact2' policy cannot be predicted: LeRobot reads the value of its loss"
    )


class _Torch:
    """In the place of torch where LeRobot switches autocast off, which the meta device does not have."""

    def autocast(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _without_autocast(backbone: Any, **kwargs: Any) -> Tensor:
    """`generate_actions_from_inputs` on the meta device."""
    from lerobot.policies.molmoact2.molmoact2_hf_model import modeling_molmoact2 as lerobots

    with replaced(lerobots, torch=_Torch()):
        chunk: Tensor = type(backbone).generate_actions_from_inputs(backbone, **kwargs)
    return chunk


def _autocast(policy: Any) -> AbstractContextManager[Any]:
    """The one that LeRobot enters to act."""
    device, dtype = next(policy.parameters()).device.type, getattr(torch, policy.config.model_dtype)
    if device not in ("cuda", "cpu") or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device_type=device, dtype=dtype)


def _distance(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean squared distance of velocities, over the entries of the action that LeRobot's loss reads.

    Args:
        student: [b * times, steps, max_action_dim], the flow's times of a sample one after the other.
        teacher: The same shape.
        batch: Holds the actions [b, steps, max_action_dim], and perhaps `action_dim_is_pad` [b, max_action_dim] and
            `action_horizon_is_pad` [b, steps].
    """
    error = (student.float() - teacher.float()).square().unflatten(0, (len(batch[ACTION]), -1))
    counts = torch.ones_like(error, dtype=torch.bool)
    if (pad := batch.get("action_dim_is_pad")) is not None:
        counts &= ~pad[:, None, None]
    if (pad := batch.get("action_horizon_is_pad")) is not None:
        counts &= ~pad[:, None, :, None]
    return mean_where(error, counts)


@written_once
def write_small_checkpoint(folder: Path) -> None:
    """A small checkpoint as Ai2 publishes them, for 15 x 15 patches, which become 8 x 8 tokens."""
    from lerobot.policies.molmoact2 import processor_molmoact2 as texts
    from lerobot.policies.molmoact2.molmoact2_hf_model import processing_molmoact2 as images
    from lerobot.policies.molmoact2.molmoact2_hf_model.configuration_molmoact2 import MolmoAct2Config
    from lerobot.policies.molmoact2.molmoact2_hf_model.modeling_molmoact2 import MolmoAct2ForConditionalGeneration

    tokens = {
        "image_patch_id": images.IMAGE_PATCH_TOKEN,
        "image_col_id": images.IM_COL_TOKEN,
        "image_start_token_id": images.IM_START_TOKEN,
        "low_res_image_start_token_id": images.LOW_RES_IMAGE_START_TOKEN,
        "frame_start_token_id": images.FRAME_START_TOKEN,
        "image_end_token_id": images.IM_END_TOKEN,
        "frame_end_token_id": images.FRAME_END_TOKEN,
        "image_low_res_id": images.IMAGE_LOW_RES_TOKEN,
        "action_output_token_id": texts.ACTION_OUTPUT_TOKEN,
        "action_start_token_id": texts.ACTION_START_TOKEN,
        "action_end_token_id": texts.ACTION_END_TOKEN,
        "state_start_token_id": texts.STATE_START_TOKEN,
        "state_end_token_id": texts.STATE_END_TOKEN,
        "state_token_start_id": f"{texts.STATE_TOKEN_PREFIX}0>",
        "action_token_start_id": f"{texts.ACTION_TOKEN_PREFIX}0>",
    }
    around = (texts.SETUP_START_TOKEN, texts.SETUP_END_TOKEN, texts.CONTROL_START_TOKEN, texts.CONTROL_END_TOKEN)
    bins = [f"{prefix}{i}>" for prefix in (texts.STATE_TOKEN_PREFIX, texts.ACTION_TOKEN_PREFIX) for i in range(STATES)]
    markers = (*list(tokens.values())[:-2], *bins, *around, "<|im_start|>", "<|im_end|>")
    # Its tokenizer writes spaces like this.
    vocabulary = ("<pad>", "</s>", "<s>", "<unk>", *markers, "Ġ", *CHARACTERS)
    write_character_tokenizer(folder, vocabulary, markers)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": "left"}))
    processor: dict[str, Any] = {
        "image_processor": {"size": {"height": SIDE, "width": SIDE}, "patch_size": PATCH, "crop_mode": "resize"},
        "use_single_crop_col_tokens": False,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 16}
    sdpa = {"attn_implementation": "sdpa"}
    config = MolmoAct2Config(
        **{name: vocabulary.index(token) for name, token in tokens.items()},
        vit_config=heads
        | sdpa
        | {
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "image_default_input_size": (SIDE, SIDE),
            "image_patch_size": PATCH,
            "image_num_pos": (SIDE // PATCH) ** 2,
        },
        adapter_config=heads
        | sdpa
        | {"vit_layers": (-1, -2), "pooling_attention_mask": True, "intermediate_size": 32, "text_hidden_size": 32},
        text_config={
            **sdpa,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": len(vocabulary),
            "additional_vocab_size": 8,
            "qkv_bias": False,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 1024,
            "use_qk_norm": True,
            "qk_norm_type": "qwen3",
        },
        action_expert_config={"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_multiple_of": 16},
        max_action_horizon=HORIZON,
        num_state_tokens=STATES,
        num_action_tokens=STATES,
        eos_token_id=vocabulary.index("</s>"),
    )
    model = MolmoAct2ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_f" not in name:
            # LeRobot's own are so small that hardly anything changes an action; some are zero.
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
