"""EVO1: InternViT -> pixel shuffle and projector -> placeholders in the prompt -> Qwen2 -> flow-matching action head.

Modifications, from outside, of `lerobot/policies/evo1`, from LeRobot 0.6.1 on:
- `Evo1Policy._collect_image_batches` also runs the vision tower, once for all cameras, and the reducer; what it returns
  as the images are tokens. There the whole batch is visible: instruction, state, camera keys.
- `InternVL3Embedder.get_fused_image_text_embedding_batched` writes as many placeholders into the prompt as there are
  tokens: LeRobot's own number of tiles of an image, of one token each.
- `InternVL3Embedder._mask_absent_image_tokens` has nothing to mask: views that the batch lacks are masked blank images
  in LeRobot, and have no placeholders here. What follows keeps the positions that it would have behind them.
- `InternVLModel.get_image_features` lets tokens pass.
- `Evo1Policy._compute_fused_tokens` lets gradients through a frozen vision-language model, whose output LeRobot cuts
  from the graph: a reducer would learn nothing.
- With dense positions `InternVLModel.forward` gets position ids.
- `FlowmatchingActionHead.get_action`: with a fast runtime the prepared images travel there, and the runtime acts.
LeRobot brings images to a square without their aspect ratio.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor, nn

from ..errors import GridsError, UnsupportedPolicyError
from ..reducers import TokenLayout
from ..reducers.anchors import WHOLE, Region
from ..runtime import FastRuntime, Phases
from .acting import Prepared
from .base import DensePolicy, Family, Recipe, Stages, Target, refuse_second_attach, replaced
from .characters import CHARACTERS, write_character_tokenizer
from .distances import mean_where
from .factory import recognise_wrapped
from .phases.evo1 import END, IMAGE, START, VISION, Asked, Prefill, Prompt, Step, get_action, parts_of
from .positions import cell_numbers
from .seam import Seam
from .small_qwen import sharpen
from .written_once import written_once

# Sizes of InternVL3-1B.
INTERNVL3_1B: dict[str, Any] = {
    "downsample_ratio": 0.5,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": [448, 448],
        "patch_size": [14, 14],
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 151674,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    },
}
# Of the small tokenizer.
VOCABULARY = ("<pad>", "</s>", "<s>", "<unk>", IMAGE, START, END, *CHARACTERS)


class Evo1(Family):
    """EVO1 on InternVL3."""

    resolution_field = "image_resolution"
    extra = "evo1"
    packages = ("transformers",)
    flow_steps = "num_inference_timesteps"
    counted_on_meta = True
    # Its prefill takes the words of a prompt, and what is in front of each.
    exports = False
    steps: ClassVar = {
        "evo1_pad_state_processor": frozenset({"max_state_dim"}),
        "evo1_pad_action_processor": frozenset({"max_action_dim"}),
        "evo1_action_processor": frozenset(
            {
                *("action_dim", "binarize_gripper", "gripper_index", "gripper_threshold"),
                *("gripper_below_threshold_value", "gripper_above_threshold_value"),
            }
        ),
    }
    repositories: ClassVar = {
        "vlm_model_name": frozenset({"OpenGVLab/InternVL3-1B-hf"}),
        "vlm_dtype": frozenset({"bfloat16", "float16", "float32"}),
    }

    def layout(self, policy: DensePolicy) -> TokenLayout:
        vlm = policy.model.embedder.model.config
        vision, times = vlm.vision_config, round(1 / vlm.downsample_ratio)
        height, width = (
            side // (patch * times) for side, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        cameras = self.cameras(policy)
        return TokenLayout(
            token_grid=(height, width),
            width=vlm.text_config.hidden_size,
            cameras=tuple(cameras),
            language_width=vlm.text_config.hidden_size,
            state_width=policy.config.max_state_dim,
            regions=tuple(cameras.values()),
        )

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("_collect_image_batches" in vars(policy))
        recognise_wrapped(self.policy_type)
        embedder = policy.model.embedder
        # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
        policy._collect_image_batches = partial(_collect_image_batches, policy, seam)
        policy._compute_fused_tokens = partial(_compute_fused_tokens, policy)
        policy.model.action_head.get_action = partial(get_action, policy, seam, partial(_reduce, policy, seam))
        embedder.get_fused_image_text_embedding_batched = partial(_fuse, embedder, None)
        embedder._mask_absent_image_tokens = _keep_mask
        embedder.model.get_image_features = _get_image_features

    def keep_positions(self, policy: Any, seam: Seam) -> None:
        seam.remember_coordinates()
        embedder = policy.model.embedder
        embedder.get_fused_image_text_embedding_batched = partial(_fuse, embedder, seam)

    def detach(self, policy: Any) -> None:
        embedder = policy.model.embedder
        for owner, names in (
            (policy, ("_collect_image_batches", "_compute_fused_tokens")),
            (policy.model.action_head, ("get_action",)),
            (embedder, ("get_fused_image_text_embedding_batched", "_mask_absent_image_tokens")),
            (embedder.model, ("get_image_features",)),
        ):
            for name in names:
                vars(owner).pop(name, None)

    def feature_source(self, policy: Any) -> nn.Module:
        projector: nn.Module = policy.model.embedder.model.multi_modal_projector
        return projector

    def image_region(self, policy: Any, height: int, width: int) -> Region:
        return WHOLE

    def act_through(self, policy: Any, seam: Seam, runtime: FastRuntime) -> None:
        # `get_action` asks for it.
        seam.runtime = runtime

    @torch.no_grad()
    def phases(self, policy: Any, seam: Seam, cameras: list[int], steps: int) -> Phases:
        parts, config = parts_of(policy), policy.config
        dense = policy.model.embedder.get_fused_image_text_embedding_batched.args[-1] is not None
        prompt = Prompt(config.max_views, dense, config.return_cls_only)
        prefill = Prefill(parts, seam, cameras, prompt, policy._env_action_dim)
        return Phases(prefill, Step(parts.head, steps), vision=VISION)

    def to_bfloat16(self, policy: Any) -> bool:
        policy.config.vlm_dtype = "bfloat16"
        embedder = policy.model.embedder
        embedder.model_dtype = torch.bfloat16
        embedder.model.to(torch.bfloat16)
        return True

    def target(self, policy: DensePolicy) -> Target:
        return Target(policy.model.action_head.mlp_head, _distance)

    def stages(self, policy: DensePolicy) -> Stages:
        vlm = policy.model.embedder.model
        return Stages(vlm.vision_tower, vlm.multi_modal_projector, self.flow_steps, "get_vl_embeddings")

    def set_steps(self, policy: DensePolicy, steps: int) -> None:
        super().set_steps(policy, steps)
        policy.model.action_head.num_inference_timesteps = steps

    def prefix_length(self, prefix: Any) -> int:
        tokens, mask = prefix
        return 1 if mask is None else int(tokens.shape[1])

    def complete(self, policy: DensePolicy, batch: dict[str, Any]) -> dict[str, Any]:
        count, length = batch[OBS_LANGUAGE_TOKENS].shape
        # One token for each character, in a policy that `offline` helped to build.
        return batch | {policy.config.task_field: ["a" * length] * count}

    def config(self, inputs: dict[str, Any], outputs: dict[str, Any], size: int, dtype: str) -> Any:
        from lerobot.policies.evo1.configuration_evo1 import Evo1Config

        if size != self.image_size:
            raise UnsupportedPolicyError(
                f"InternVL3-1B sees images of {self.image_size} pixels, not {size}; drop --resolution"
            )
        return Evo1Config(
            device="cpu",
            input_features=inputs,
            output_features=outputs,
            vlm_dtype=dtype,
            max_views=max(3, sum(name.startswith("observation.image") for name in inputs)),
        )

    @contextmanager
    def offline(self, config: Any) -> Iterator[None]:
        from lerobot.policies.evo1 import internvl3_embedder
        from transformers import AutoModel, InternVLConfig

        class Sizes:
            @staticmethod
            def from_pretrained(name: str, torch_dtype: torch.dtype, attn_implementation: str, **kwargs: Any) -> Any:
                sizes = InternVLConfig(**INTERNVL3_1B, image_token_id=VOCABULARY.index(IMAGE))
                return AutoModel.from_config(sizes, dtype=torch_dtype, attn_implementation="eager")

        class Characters:
            @staticmethod
            def from_pretrained(name: str, **kwargs: Any) -> Any:
                with TemporaryDirectory() as folder:
                    return _tokenizer(Path(folder))

        with replaced(internvl3_embedder, AutoModel=Sizes, AutoTokenizer=Characters):
            yield

    def finish(self, policy: Any) -> None:
        vlm = policy.model.embedder.model
        # On the meta device masks have no values: the placeholders are as many as the tokens, and nothing is padded.
        if next(policy.parameters()).is_meta:
            vlm.get_placeholder_mask = partial(_placeholders, vlm)
            vlm.language_model.register_forward_pre_hook(_without_mask, with_kwargs=True)

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        from lerobot.policies.evo1.configuration_evo1 import Evo1Config
        from lerobot.policies.evo1.modeling_evo1 import Evo1Policy

        cameras = sum(name.startswith("observation.image") for name in inputs)
        fields: dict[str, Any] = {
            "vlm_model_name": str(_write_small_internvl(folder / "internvl")),
            "vlm_num_layers": 2,
            "vlm_dtype": "float32",
            "use_flash_attn": False,
            "use_amp": False,
            "image_resolution": (64, 64),
            "max_views": cameras + options.get("empty_cameras", 0),
            "chunk_size": 8,
            "n_action_steps": 8,
            "max_state_dim": 8,
            "max_action_dim": 8,
            "embed_dim": 32,
            "hidden_dim": 32,
            "state_hidden_dim": 16,
            "num_heads": 2,
            "num_layers": 1,
            "num_inference_timesteps": 3,
        }
        return Evo1Policy(Evo1Config(device="cpu", input_features=inputs, output_features=outputs, **fields | options))

    def narrow(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        _write_narrow_internvl(folder / "internvl")
        fields: dict[str, Any] = {"max_state_dim": 24, "max_action_dim": 24} | options
        fields |= {"vlm_num_layers": 14, "num_layers": 8, "num_heads": 8, "num_inference_timesteps": 32}
        # `small` takes the model that is there.
        return self.small(inputs, outputs, folder, **fields | {"chunk_size": 50, "n_action_steps": 50})


FAMILIES = (
    Evo1(
        "evo1",
        # LeRobot publishes no policy: it begins with InternVL3-1B and a new action head.
        sources={"evo1": None},
        # LeRobot's own preset.
        recipe=Recipe(steps=20_000, batch=64, micro_batch=8, lr=1e-5, warmup=0.015),
        image_size=448,
        language_tokens=48,
    ),
)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write_character_tokenizer(folder, VOCABULARY, (IMAGE, START, END)))


@written_once
def _write_small_internvl(folder: Path) -> None:
    """An InternVL of 16 x 16 patches, which become 8 x 8 tokens, with its tokenizer."""
    from transformers import AutoModel, InternVLConfig

    _tokenizer(folder)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InternVLConfig(
        image_token_id=VOCABULARY.index(IMAGE),
        image_seq_length=64,
        downsample_ratio=0.5,
        vision_config=vision | {"image_size": [64, 64], "patch_size": [4, 4]},
        text_config=text | {"model_type": "qwen2", "vocab_size": len(VOCABULARY), "num_key_value_heads": 1},
    )
    model = AutoModel.from_config(config)
    sharpen(model.language_model)
    model.save_pretrained(folder)


@written_once
def _write_narrow_internvl(folder: Path) -> None:
    """The same with all layers of InternVL3-1B."""
    from transformers import AutoConfig, AutoModel

    _write_small_internvl(folder)
    config = AutoConfig.from_pretrained(folder)
    for part in ("vision_config", "text_config"):
        getattr(config, part).num_hidden_layers = INTERNVL3_1B[part]["num_hidden_layers"]
    # It has a kind of attention for each layer.
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    model = AutoModel.from_config(config)
    sharpen(model.language_model)
    model.save_pretrained(folder)


def _distance(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean squared distance of velocities, over the entries of the action that LeRobot's loss reads.

    Args:
        student: [b, steps * max_action_dim].
        teacher: The same shape.
        batch: Holds the actions [b, steps, action_dim], and perhaps `action_mask` of that shape and `action_is_pad`
            [b, steps].
    """
    steps, size = batch[ACTION].shape[-2:]
    error = (student.float() - teacher.float()).square().unflatten(-1, (steps, -1))[..., :size]
    counts = torch.ones_like(error, dtype=torch.bool)
    if (mask := batch.get("action_mask")) is not None:
        counts &= mask.bool()
    if (pad := batch.get("action_is_pad")) is not None:
        counts &= ~pad[..., None]
    return mean_where(error, counts)


def _collect_image_batches(policy: Any, seam: Seam, batch: dict[str, Any]) -> tuple[Any, Tensor]:
    from lerobot.policies.evo1 import internvl3_embedder as lerobots

    images, masks = type(policy)._collect_image_batches(policy, batch)
    embedder = policy.model.embedder
    device, dtype = embedder.device, embedder.model_dtype
    mean, std = (
        torch.tensor(values, device=device, dtype=dtype) for values in (lerobots.IMAGENET_MEAN, lerobots.IMAGENET_STD)
    )
    prepared = [
        lerobots._batched_pixel_values([image], 1, embedder.image_size, mean, std, dtype, device) for image in images
    ]
    texts = [text.strip() for text in policy._normalize_task_batch(batch)]
    words = embedder.tokenizer(
        texts, return_tensors="pt", padding=True, truncation=True, max_length=embedder.max_text_length
    ).to(device)
    language = {OBS_LANGUAGE_TOKENS: words["input_ids"], OBS_LANGUAGE_ATTENTION_MASK: words["attention_mask"].bool()}
    whole = Prepared(prepared, {**batch, **language})
    return whole if seam.acts_in_phases else _reduce(policy, seam, whole), masks


def _reduce(policy: Any, seam: Seam, prepared: Prepared) -> list[Tensor]:
    vlm = policy.model.embedder.model
    # There LeRobot runs the vision tower.
    with policy._maybe_autocast():
        return seam.tokens(prepared.images, prepared.batch, partial(_encode, vlm), vlm.get_input_embeddings())


def _encode(vlm: Any, images: Tensor) -> Tensor:
    tokens: Tensor = type(vlm).get_image_features(vlm, images, return_dict=True).pooler_output
    return tokens


def _get_image_features(pixel_values: Tensor, **kwargs: Any) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(pooler_output=pixel_values)


def _keep_mask(input_ids: Tensor, attention_mask: Tensor, *args: Any) -> Tensor:
    return attention_mask


class _Trained:
    """A policy whose vision-language model trains, which is all that its `_compute_fused_tokens` asks about that."""

    _tracks_vlm_gradients = True

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


def _compute_fused_tokens(policy: Any, prompts: list[str], images: Any, masks: Tensor) -> Any:
    if isinstance(images, Prepared):
        return Asked(images, masks, prompts), None
    return type(policy)._compute_fused_tokens(_Trained(policy), prompts, images, masks)


def _fuse(
    embedder: Any,
    seam: Seam | None,
    camera_images: list[Tensor],
    image_masks: Tensor,
    text_prompts: list[str],
    return_cls_only: bool = True,
) -> Any:
    """What the language model makes of the prompt and of tokens [b, k, c] of each view; positions as `seam` says."""
    if any(IMAGE in text for text in text_prompts):
        raise GridsError(f"an instruction holds '{IMAGE}', which stands for a visual token; remove it from the task")
    counts = [tokens.shape[1] for tokens in camera_images]
    counts += [0] * (image_masks.shape[1] - len(counts))
    number = partial(_with_positions, embedder, seam, counts, len(camera_images))
    handle = embedder.model.register_forward_pre_hook(number, with_kwargs=True)
    try:
        with replaced(embedder, num_image_token=1):
            tiles = [counts] * len(text_prompts)
            return embedder._forward_vlm(
                torch.cat(camera_images, dim=1), tiles, image_masks, text_prompts, return_cls_only
            )
    finally:
        handle.remove()


def _with_positions(
    embedder: Any, seam: Seam | None, counts: list[int], real: int, vlm: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    if seam is None and real == len(counts):
        return args, kwargs
    ids: Tensor = kwargs["input_ids"]
    start = embedder.tokenizer.convert_tokens_to_ids(START)
    cells, virtual = None, counts[:real] + [max(counts[:real])] * (len(counts) - real)
    if seam is not None:
        virtual = [seam.layout.num_dense_tokens] * len(counts)
        if seam.coordinates:
            cells = [cell_numbers(camera, seam.layout.token_grid) for camera in seam.coordinates]
    positions = scattered_positions(ids == embedder.img_context_token_id, ids == start, counts, virtual, cells)
    return args, kwargs | {"position_ids": positions}


def scattered_positions(
    is_image: Tensor, is_start: Tensor, counts: list[int], virtual: list[int], cells: list[Tensor] | None
) -> Tensor:
    """Positions of a sequence with views in it, as if each view had another number of tokens.

    Args:
        is_image: Bool [b, l], the placeholders of visual tokens.
        is_start: Bool [b, l], the tokens in front of each view's; later ones are text.
        counts: Placeholders of each view.
        virtual: How many there are to be.
        cells: float32 [b, k] of each view that has placeholders, which of those each is; None for the first ones.

    Returns:
        [b, l], float32 where there are cells.
    """
    begun = is_start.cumsum(1).clamp(max=len(counts))
    within = is_image | (is_start & (is_start.cumsum(1) <= len(counts)))
    missing = torch.tensor([0, *(v - c for v, c in zip(virtual, counts, strict=True))], device=is_image.device)
    positions = torch.arange(is_image.shape[1], device=is_image.device) + missing.cumsum(0)[begun - within.long()]
    if cells is None:
        return positions
    views = torch.arange(1, len(cells) + 1, device=is_image.device)
    first = (begun[:, None] < views[:, None]).sum(-1)
    placed = [cell + (positions.gather(1, first)[:, [i]] + 1) for i, cell in enumerate(cells)]
    return positions.float().masked_scatter(is_image, torch.cat(placed, dim=1))


def _placeholders(vlm: Any, input_ids: Tensor, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
    return (input_ids == vlm.config.image_token_id).unsqueeze(-1).expand_as(inputs_embeds)


def _without_mask(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"attention_mask": None}
