"""GR00T N1.7: a Qwen3-VL, from whose last states a transformer of its own reads, layer by layer images or words.

Modifications, from outside, of `lerobot/policies/groot`, from LeRobot 0.6.1 on:
- `GrootPolicy._filter_groot_inputs` also runs the vision tower, once for all cameras, and the reducer, and cuts the
  prompt (`qwen.scatter`). The action transformer's masks of images and words are made of the prompt, so they follow.
- `Qwen3VLModel.get_image_features` and `get_rope_index` take what that gives. Features that the model adds in later
  layers (deepstack) are read at the same coordinates.
The pre-processor stretches images to a square and keeps its middle, as the base checkpoint's files say, and hands over
patches alone: after it no camera can be missing. It normalises states and actions itself.

A fast runtime acts in two phases, and `GR00TN17.get_action` hands over to them: `phases.groot`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from ..reducers import TokenLayout
from ..reducers.anchors import WHOLE, Region
from ..runtime import FastRuntime, Phases
from .base import (
    Family,
    Recipe,
    Stages,
    Target,
    centred_region,
    image_size,
    refuse_second_attach,
    replaced,
)
from .distances import mean_where
from .factory import recognise_wrapped
from .phases.groot import VISION, Prefill, Step, get_action, parts_of
from .qwen import attach_model, detach_model, image_grid, made_up_prompt, no_training_step, scatter
from .seam import Seam
from .small_qwen import sharpen, write_small_qwen3
from .written_once import written_once


class Depths(NamedTuple):
    """Layers of a checkpoint: of the vision tower, those whose features the trunk gets, too, of the trunk, of the
    transformer that reads it alone, and of the one that makes actions.
    """

    vision: int
    deepstack: tuple[int, ...]
    trunk: int
    readers: int
    transformer: int


# Pixels of an image, at least and at most, of the image processor of the one backbone that LeRobot's processor has.
LEAST_PIXELS, MOST_PIXELS = 2**16, 2**24
# Of the small instance.
EMBODIMENT, PATCH, HORIZON, SIZE = "new_embodiment", 16, 8, 4
# The state of the last layer is read without what would be added behind it.
SMALL_DEPTHS = Depths(vision=2, deepstack=(0, 1), trunk=3, readers=1, transformer=3)
# Of the published checkpoint.
REAL_DEPTHS = Depths(vision=24, deepstack=(5, 11, 17), trunk=16, readers=4, transformer=32)


class Groot(Family):
    """GR00T N1.7 on Qwen3-VL."""

    resolution_field = None
    extra = "groot"
    packages = ("transformers", "diffusers", "tree")
    counted_on_meta = True
    exports = False
    spares_cameras = False
    flow_steps = "num_inference_timesteps"
    steps: ClassVar = {
        "groot_n1_7_pack_inputs_v1": frozenset(
            {
                *("state_horizon", "action_horizon", "valid_action_horizon", "video_horizon", "max_state_dim"),
                *("max_action_dim", "language_key", "formalize_language", "embodiment_tag", "embodiment_mapping"),
                *("normalize_min_max", "state_dropout_prob", "clip_outliers", "use_percentiles"),
                *("video_modality_keys", "raw_stats", "modality_config"),
            }
        ),
        "groot_n1_7_vlm_encode_v1": frozenset(
            {
                *("model_name", "image_crop_size", "image_target_size", "shortest_image_edge", "crop_fraction"),
                *("use_albumentations", "letter_box_transform", "device"),
            }
        ),
        "groot_n1_7_action_decode_v1": frozenset(
            {
                *("env_action_dim", "raw_stats", "modality_config", "use_percentiles", "use_relative_action"),
                "action_decode_transform",
            }
        ),
        "groot_action_unpack_unnormalize_v2": frozenset(
            {
                *("env_action_dim", "normalize_min_max", "clip_normalized_action", "libero_gripper_action"),
                "libero_gripper_binarize",
            }
        ),
    }
    repositories: ClassVar = {
        "base_model_path": frozenset({"nvidia/GR00T-N1.7-3B"}),
        "model_name": frozenset({"nvidia/Cosmos-Reason2-2B"}),
    }

    def model(self, policy: Any) -> Any:
        return policy._groot_model

    def layout(self, policy: Any) -> TokenLayout:
        config, vlm = policy.config, policy._groot_model.backbone.model.config
        cameras = self.cameras(policy)
        shapes = {name: _seen_size(config, *image_size(config.image_features[name].shape)) for name in cameras}
        return TokenLayout(
            token_grid=image_grid(shapes, vlm.vision_config, LEAST_PIXELS, MOST_PIXELS),
            width=vlm.text_config.hidden_size,
            cameras=tuple(cameras),
            language_width=vlm.text_config.hidden_size,
            state_width=policy._groot_model.config.max_state_dim,
            regions=tuple(cameras.values()),
        )

    def cameras(self, policy: Any) -> dict[str, Region]:
        found = super().cameras(policy)
        return {name: found[name] for name in _packing(policy.config)._ordered_image_keys(dict.fromkeys(found))}

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("_filter_groot_inputs" in vars(policy))
        recognise_wrapped(self.policy_type)
        seam.remember_coordinates()
        _attach(policy, seam, dense=False)
        attach_model(policy._groot_model.backbone.model.model)

    def keep_positions(self, policy: Any, seam: Seam) -> None:
        _attach(policy, seam, dense=True)

    def detach(self, policy: Any) -> None:
        vars(policy).pop("_filter_groot_inputs", None)
        vars(policy._groot_model).pop("get_action", None)
        detach_model(policy._groot_model.backbone.model.model)

    def feature_source(self, policy: Any) -> nn.Module:
        merger: nn.Module = policy._groot_model.backbone.model.model.visual.merger
        return merger

    def image_region(self, policy: Any, height: int, width: int) -> Region:
        left, top, right, bottom = self.seen_region(policy, height, width)
        return max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0)

    def seen_region(self, policy: Any, height: int, width: int) -> Region:
        step = _encoding(policy.config)
        side = max(height, width)
        square = centred_region(height, width, side, side) if step.letter_box_transform else WHOLE
        # LeRobot's rule, in both of its ways to prepare an image.
        kept = step.crop_fraction
        if kept is None:
            kept = step.image_crop_size[0] / step.image_target_size[0] if step.image_crop_size else 1.0
        if not 0 < kept < 1:
            return square
        left, top, right, bottom = ((edge - (1 - kept) / 2) / kept for edge in square)
        return left, top, right, bottom

    @contextmanager
    def without_weights(self, config: Any) -> Iterator[None]:
        from lerobot.policies.groot import modeling_groot
        from lerobot.policies.groot.groot_n1_7 import GR00TN17Config

        with replaced(modeling_groot, GR00TN17=_Sizes(GR00TN17Config.from_pretrained)):
            yield

    @contextmanager
    def offline(self, config: Any) -> Iterator[None]:
        from lerobot.policies.groot.groot_n1_7 import GR00TN17Config

        # Its defaults are the published checkpoint's.
        with replaced(GR00TN17Config, from_pretrained=lambda name: GR00TN17Config()):
            yield

    def finish(self, policy: Any) -> None:
        if next(policy.parameters()).is_meta:
            policy.predict_action_chunk = partial(_without_autocast, policy)
            policy.forward = partial(no_training_step, self.policy_type)

    def act_through(self, policy: Any, seam: Seam, runtime: FastRuntime) -> None:
        # `get_action` asks for it.
        seam.runtime = runtime

    @torch.no_grad()
    def phases(self, policy: Any, seam: Seam, cameras: list[int], steps: int) -> Phases:
        parts, dense = parts_of(policy), policy._filter_groot_inputs.args[-1]
        return Phases(Prefill(parts, seam, cameras, steps, dense), Step(parts.head, steps), vision=VISION)

    def to_bfloat16(self, policy: Any) -> bool:
        policy.config.model_params_fp32 = False
        policy._groot_model.bfloat16()
        return True

    def target(self, policy: Any) -> Target:
        head = policy._groot_model.action_head
        # In training it first draws which states it leaves out.
        return Target(head.action_decoder, _distance, noise=(head.action_encoder, (0, 1)))

    def stages(self, policy: Any) -> Stages:
        visual = policy._groot_model.backbone.model.model.visual
        return Stages(visual, visual.merger, self.flow_steps, "backbone._last_decoder_layer_output")

    def count_steps(self, policy: Any) -> int:
        # LeRobot's configuration may leave it to the checkpoint.
        return int(policy._groot_model.action_head.num_inference_timesteps)

    def set_steps(self, policy: Any, steps: int) -> None:
        super().set_steps(policy, steps)
        policy._groot_model.action_head.num_inference_timesteps = steps

    def prefix_length(self, prefix: Any) -> int:
        return int(prefix.shape[1])

    def complete(self, policy: Any, batch: dict[str, Any]) -> dict[str, Any]:
        sizes, state = policy._groot_model.config, batch[OBS_STATE]
        count, words = batch[OBS_LANGUAGE_TOKENS].shape
        qwen = policy._groot_model.backbone.model.config
        whole = {
            **made_up_prompt(self.layout(policy), qwen, count, words, state.device),
            "state": nn.functional.pad(state, (0, sizes.max_state_dim - state.shape[-1]))[:, None],
            "embodiment_id": torch.zeros(count, dtype=torch.long, device=state.device),
        }
        if (action := batch.get(ACTION)) is not None:
            steps, width = sizes.action_horizon - action.shape[1], sizes.max_action_dim - action.shape[2]
            whole["action_mask"] = nn.functional.pad(torch.ones_like(action), (0, width, 0, steps))
            whole[ACTION] = nn.functional.pad(action, (0, width, 0, steps))
        return batch | whole

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        from lerobot.policies.groot.configuration_groot import GrootConfig
        from lerobot.policies.groot.modeling_groot import GrootPolicy

        fields: dict[str, Any] = {
            "base_model_path": str(_write_small_checkpoint(folder / "groot")),
            "embodiment_tag": EMBODIMENT,
            "chunk_size": HORIZON,
            "n_action_steps": HORIZON,
            "max_state_dim": 8,
            "max_action_dim": 8,
            "num_inference_timesteps": 3,
            "tune_llm": True,
            "tune_visual": True,
            "use_bf16": False,
        }
        config = GrootConfig(device="cpu", input_features=inputs, output_features=outputs, **fields | options)
        policy = GrootPolicy(config)
        if not config.model_params_fp32:
            policy.bfloat16()
        return policy

    def narrow(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        fields: dict[str, Any] = {"max_state_dim": 32, "max_action_dim": 32} | options
        fields |= {"chunk_size": 40, "n_action_steps": 40, "num_inference_timesteps": 4}
        widths = {name: fields[name] for name in ("max_state_dim", "max_action_dim")}
        # `small` takes the one that is there.
        _write_small_checkpoint(folder / "groot", REAL_DEPTHS, action_horizon=40, max_seq_len=64, **widths)
        return self.small(inputs, outputs, folder, **fields)


FAMILIES = (
    Groot(
        "groot",
        # LeRobot begins with NVIDIA's own checkpoint, which is none of LeRobot's.
        sources={"groot": None},
        # LeRobot's own preset.
        recipe=Recipe(steps=10_000, batch=32, micro_batch=4, lr=1e-4, warmup=0.05),
        image_size=256,
        language_tokens=48,
    ),
)


class _Sizes:
    """In the place of the class of GR00T's model: the same with random weights.

    Args:
        sizes: Gives the configuration of a checkpoint.
    """

    def __init__(self, sizes: Any) -> None:
        self.sizes = sizes

    def from_pretrained(self, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        from lerobot.policies.groot.groot_n1_7 import GR00TN17

        config = self.sizes(pretrained_model_name_or_path)
        loading = kwargs.pop("transformers_loading_kwargs")
        for name, value in kwargs.items():
            setattr(config, name, value)
        return GR00TN17(config, transformers_loading_kwargs=loading, load_backbone_weights=False)


def _packing(config: Any) -> Any:
    """The step of LeRobot's pre-processor that orders the cameras, as a configuration has it."""
    from lerobot.policies.groot.processor_groot import GrootN17PackInputsStep, _load_n1_7_checkpoint_processor_assets

    files = _load_n1_7_checkpoint_processor_assets(config)
    return GrootN17PackInputsStep(video_modality_keys=None if files is None else files.video_modality_keys)


def _encoding(config: Any) -> Any:
    """The step of LeRobot's pre-processor that prepares images, as a configuration has it."""
    from lerobot.policies.groot.processor_groot import GrootN17VLMEncodeStep, make_groot_pre_post_processors

    # Statistics, without which LeRobot makes none, are of no use here.
    nothing = {name: {"min": torch.zeros(1), "max": torch.ones(1)} for name in (OBS_STATE, ACTION)}
    with replaced(config, use_relative_actions=False):
        preprocessor, _ = make_groot_pre_post_processors(config, nothing)
    return next(step for step in preprocessor.steps if isinstance(step, GrootN17VLMEncodeStep))


def _seen_size(config: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width of what LeRobot's pre-processor makes of an image."""
    step = _encoding(config)
    ((image,),) = step._build_sample_images(torch.zeros(1, 1, 1, height, width, 3, dtype=torch.uint8), 1, None)
    return image_size(image.shape)


def _attach(policy: Any, seam: Seam, dense: bool) -> None:
    # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
    policy._filter_groot_inputs = partial(_filter_groot_inputs, policy, seam, dense)
    policy._groot_model.get_action = partial(get_action, policy, seam, partial(_reduce, policy, seam, dense, {}))


def _filter_groot_inputs(
    policy: Any, seam: Seam, dense: bool, batch: dict[str, Any], *, include_action: bool
) -> dict[str, Any]:
    inputs: dict[str, Any] = type(policy)._filter_groot_inputs(policy, batch, include_action=include_action)
    if seam.acts_in_phases and not include_action:
        return inputs
    return _reduce(policy, seam, dense, batch, inputs)


def _reduce(policy: Any, seam: Seam, dense: bool, batch: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    model = policy._groot_model
    # On the device and in the precision in which LeRobot runs all of it.
    prepared, _ = model.prepare_input(inputs)
    prepared = dict(prepared)
    backbone = model.backbone
    backbone._ensure_mm_token_type_ids(prepared)
    known = {**batch, OBS_STATE: prepared["state"][:, -1]}
    with torch.autocast(
        device_type=prepared["input_ids"].device.type, dtype=torch.bfloat16, enabled=policy.config.use_bf16
    ):
        return scatter(seam, backbone.model.model, known, prepared, dense=dense)


def _without_autocast(policy: Any, batch: dict[str, Any], **kwargs: Any) -> Tensor:
    """`predict_action_chunk` on the meta device, which has no autocast. Operations are the same."""
    from lerobot.policies.groot import modeling_groot

    place = replaced(modeling_groot, get_device_from_parameters=lambda policy: torch.device("cpu"))
    with place, replaced(policy.config, use_bf16=False):
        chunk: Tensor = type(policy).predict_action_chunk(policy, batch, **kwargs)
    return chunk


def _distance(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean squared distance of velocities, over the entries of the action that LeRobot's loss reads.

    Args:
        student: [b, 1 + steps, max_action_dim]; the first row is the state's.
        teacher: The same shape.
        batch: Holds `action_mask` [b, steps, max_action_dim].
    """
    counts = batch["action_mask"]
    error = (student.float() - teacher.float()).square()[:, -counts.shape[1] :]
    return mean_where(error, counts)


@written_once
def _write_small_checkpoint(folder: Path, depths: Depths = SMALL_DEPTHS, **options: Any) -> None:
    """A small checkpoint as NVIDIA publishes them, with statistics, for images of 256 pixels and 8 x 8 tokens.

    Args:
        folder: Where to.
        depths: Its layers.
        **options: Other fields of its configuration.
    """
    from lerobot.policies.groot.groot_n1_7 import GR00TN17, GR00TN17Config

    # LeRobot warns of a backbone with another name.
    backbone = write_small_qwen3(
        folder.parent / "Qwen" / "Qwen3-VL-small", PATCH, depths.vision, depths.deepstack, depths.trunk
    )
    attention = {"positional_embeddings": None, "num_attention_heads": 2, "dropout": 0.0, "final_dropout": True}
    sizes = {"action_horizon": HORIZON, "max_state_dim": 8, "max_action_dim": 8, "max_seq_len": 16}
    config = GR00TN17Config(
        model_name=str(backbone),
        model_dtype="float32",
        dtype="float32",
        tune_llm=True,
        tune_visual=True,
        select_layer=depths.trunk,
        backbone_embedding_dim=32,
        hidden_size=16,
        input_embedding_dim=16,
        max_num_embodiments=1,
        attn_dropout=0.0,
        state_dropout_prob=0.0,
        **sizes | options,
        # Of words, of its own, of images.
        diffusion_model_cfg=attention
        | {
            "num_layers": depths.transformer,
            "attention_head_dim": 8,
            "output_dim": 16,
            "norm_type": "ada_norm",
            "interleave_self_attention": True,
        },
        vl_self_attention_cfg=attention | {"num_layers": depths.readers, "attention_head_dim": 16},
    )
    model = GR00TN17(config)
    sharpen(model.action_head)
    for name, parameter in model.action_head.named_parameters():
        if name.endswith((".W", "to_v.weight", "to_out.0.weight")):
            # LeRobot's own are so small that hardly anything changes an action.
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    arm = {"mean": [0.0] * SIZE, "std": [1.0] * SIZE, "min": [-1.0] * SIZE, "max": [1.0] * SIZE}
    arm |= {"q01": arm["min"], "q99": arm["max"]}
    group: dict[str, Any] = {"modality_keys": ["arm"]}
    modalities = {
        "state": group | {"delta_indices": [0]},
        "action": group
        | {"delta_indices": list(range(HORIZON)), "action_configs": [{"rep": "absolute", "type": "non_eef"}]},
    }
    files: dict[str, Any] = {
        "processor_config": {"processor_kwargs": {"modality_configs": {EMBODIMENT: modalities}}},
        "statistics": {EMBODIMENT: {"state": {"arm": arm}, "action": {"arm": arm}}},
        "embodiment_id": {EMBODIMENT: 0},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
