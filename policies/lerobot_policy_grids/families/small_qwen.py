"""Qwen-VL at small size, offline: its processor on disk, and configurations of models for its tokens."""

from pathlib import Path
from typing import Any

from torch import nn

from .characters import CHARACTERS, ROLES, write_character_tokenizer
from .written_once import written_once

MARKERS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = ("<pad>", "</s>", "<s>", "<unk>", *MARKERS, *CHARACTERS)
# Families add tokens of their own behind the vocabulary.
ROOM = 64
# Images of 64 pixels have 16 x 16 patches, which become 8 x 8 tokens.
PATCH = 4
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}"
)
_IDS = {name: len(ROLES) + number for number, name in enumerate(("image", "video", "vision_start", "vision_end"))}
_TOKENS = {f"{name}_token_id": number for name, number in _IDS.items()}
_TEXT = {
    "vocab_size": len(VOCABULARY) + ROOM,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

SMALL_QWEN_2_5: dict[str, Any] = {
    **_TOKENS,
    "vision_config": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [0],
    },
    "text_config": _TEXT
    | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
}


def sharpen(model: nn.Module) -> None:
    """Let the attention of a small model with random weights depend on positions, which it hardly does otherwise."""
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "to_q.weight", "to_k.weight")):
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith(("v_proj.weight", "o_proj.weight", "to_v.weight", "to_out.0.weight")):
            nn.init.normal_(parameter, std=0.1)


@written_once
def write_small_processor(folder: Path, patch: int = PATCH, more: tuple[str, ...] = ()) -> None:
    """Save a Qwen2.5-VL processor with a tokenizer of characters.

    Args:
        folder: Where to; it is created.
        patch: Side of a patch in pixels.
        more: Further markers of a family.
    """
    from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    _save(folder, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor, patch, more)


def _save(
    folder: Path,
    processor: Any,
    images: Any,
    videos: Any,
    patch: int = PATCH,
    more: tuple[str, ...] = (),
    **of_images: Any,
) -> None:
    """Save a processor with a tokenizer of characters.

    Args:
        folder: Where to; it is created.
        processor: Its class.
        images: The class of its image processor.
        videos: The class of its video processor.
        patch: Side of a patch in pixels.
        more: Further markers of a family.
        **of_images: Options of the image processor alone.
    """
    from transformers import AutoTokenizer

    write_character_tokenizer(folder, (*VOCABULARY, *more), (*MARKERS, *more))
    size = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    processor(
        image_processor=images(**size, **of_images),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        video_processor=videos(**size),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


@written_once
def write_small_qwen3(
    folder: Path, patch: int = PATCH, vision_layers: int = 2, deepstack: tuple[int, ...] = (0, 1), layers: int = 3
) -> None:
    """Save a small Qwen3-VL with random weights and its processor.

    Args:
        folder: Where to; it is created.
        patch: Side of a patch in pixels; images are those of 16 x 16 patches or fewer.
        vision_layers: Of its vision tower.
        deepstack: Those whose features the trunk gets, too.
        layers: Of its trunk.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen2_vl import Qwen2VLImageProcessorFast
    from transformers.models.qwen3_vl import Qwen3VLVideoProcessor

    pixels = {"shortest_edge": 64, "longest_edge": (16 * patch) ** 2}
    _save(folder, Qwen3VLProcessor, Qwen2VLImageProcessorFast, Qwen3VLVideoProcessor, patch, size=pixels)
    vision = {
        "depth": vision_layers,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(deepstack),
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True, "rope_theta": 10000.0}
    text = _TEXT | {"num_hidden_layers": layers, "head_dim": 16, "rope_parameters": rope}
    config = Qwen3VLConfig(**_TOKENS, vision_config=vision, text_config=text)
    model = Qwen3VLForConditionalGeneration(config)
    sharpen(model.model.language_model)
    # At their own scale what they add would not be seen in an action.
    for merger in model.model.visual.deepstack_merger_list:
        nn.init.normal_(merger.linear_fc2.weight, std=0.3)
    model.save_pretrained(folder)
