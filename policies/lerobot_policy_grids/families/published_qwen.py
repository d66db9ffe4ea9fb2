"""Qwen-VL at its published sizes, offline: configurations for policies without weights, and a processor for prompts.

Where the sizes come from:
- `QWEN_2_5_VL_3B`: config.json of `Qwen/Qwen2.5-VL-3B-Instruct`, from which LeRobot makes an EO1 policy;
- `QWEN_3_VL_2B`: config.json of `Qwen/Qwen3-VL-2B-Instruct`, from which LeRobot makes a VLA-JEPA policy. LeRobot has
  the same numbers for GR00T's backbone (`groot_n1_7._cosmos_reason2_qwen3_vl_config`), and a test compares them.
With both, a model has as many parameters as the Hub counts. What a family changes in them is in its own file.
"""

from typing import Any

_SHARED: dict[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": True,
}
QWEN_2_5_VL_3B: dict[str, Any] = {
    **_SHARED,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": 2048,
    },
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
    },
}
QWEN_3_VL_2B: dict[str, Any] = {
    **_SHARED,
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [5, 11, 17],
        "out_hidden_size": 2048,
    },
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
            "rope_theta": 5000000.0,
        },
    },
}
# Of the tokenizer of `published_processor`: any word, and what a text is cut at before it is cut into words.
WORD = "<word>"
MARKERS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
# What a configuration says of them where prompts come from that tokenizer.
IDS = {
    "vision_start_token_id": 1 + MARKERS.index("<|vision_start|>"),
    "vision_end_token_id": 1 + MARKERS.index("<|vision_end|>"),
    "image_token_id": 1 + MARKERS.index("<|image_pad|>"),
    "video_token_id": 1 + MARKERS.index("<|video_pad|>"),
}
# As much of the published templates as prompts of images and text have.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Published:
    """In the place of a class of transformers: what it would fetch is made instead, whatever name is asked for.

    Args:
        make: Makes it.
    """

    def __init__(self, make: Any) -> None:
        self.make = make

    def from_pretrained(self, name: Any, **kwargs: Any) -> Any:
        return self.make()


def published_processor(kind: Any, images: Any, videos: Any, length: int, more: tuple[str, ...] = ()) -> Any:
    """A processor that writes prompts as long as those of the published one.

    Its tokenizer takes each piece into which Qwen's splits a text for one token, which most English words are, and
    knows no other; the ids of markers are `IDS`.

    Args:
        kind: Class of the processor.
        images: The image processor.
        videos: The video processor.
        length: Tokens of the published tokenizer.
        more: Further markers.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    vocabulary = (WORD, *MARKERS, *more)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    # LeRobot makes as many embeddings as that.
    as_long = type("AsLong", (PreTrainedTokenizerFast,), {"__len__": lambda self: length})
    fast = as_long(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=WORD,
        additional_special_tokens=[*MARKERS, *more],
    )
    return kind(image_processor=images, tokenizer=fast, video_processor=videos, chat_template=TEMPLATE)
