"""Rebuild the files in `vlm/`: `python -m lerobot_policy_grids.tiny.build_vlm FOLDER`.

They are a SmolVLM configuration with 1 vision layer and 2 language layers, and a byte-level BPE tokenizer trained on
short robot instructions: it encodes any text, and common words are one token.
"""

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMProcessor
from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

IMAGE_SIZE, PATCH_SIZE, WIDTH = 96, 8, 128
VOCABULARY_SIZE = 640
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
VERBS = "pick up, grasp, take, lift, place, put, push, pull, slide, open, close, press, turn, pour, stack, insert"
OBJECTS = (
    "cube, block, puck, ball, mug, cup, bottle, bowl, plate, box, drawer, door, button, lever, peg, hook, tray, "
    "spoon, fork, pen, tape, sponge, towel, coffee machine, cabinet, shelf, table, goal, hole, bin, basket"
)
COLOURS = "red, green, blue, yellow, orange, white, black, small, large, left, right, top, bottom"


def instructions() -> list[str]:
    """Short instructions to train the tokenizer on; their words become whole tokens."""
    verbs, objects, colours = (text.split(", ") for text in (VERBS, OBJECTS, COLOURS))
    plain = [f"{verb} the {thing}\n" for verb in verbs for thing in objects]
    coloured = [f"put the {colour} {thing} into the {colour} {thing}\n" for colour in colours for thing in objects]
    placed = [f"push the {thing} to the {other}\n" for thing in objects for other in objects]
    return plain + coloured + placed


def build(folder: Path) -> None:
    """Write configuration, tokenizer and processor files into `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(instructions(), trainer)
    names = ("pad_token", "eos_token", "bos_token", "unk_token")
    extra = {name: token for name, token in SPECIAL_TOKENS.items() if name not in names}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=list(extra.values()),
        **{name: SPECIAL_TOKENS[name] for name in names},
    )
    fast.save_pretrained(folder)
    # SmolVLA reads these tokens as attributes of the tokenizer.
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": extra}, indent=2) + "\n")
    fast = PreTrainedTokenizerFast.from_pretrained(folder)

    text = {
        "model_type": "llama",
        "vocab_size": len(fast),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": WIDTH // 4,
        "pad_token_id": fast.pad_token_id,
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": fast.eos_token_id,
        "initializer_range": 0.05,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "initializer_range": 0.05,
    }
    SmolVLMConfig(
        image_token_id=fast.convert_tokens_to_ids("<image>"),
        scale_factor=1,
        pad_token_id=fast.pad_token_id,
        text_config=text,
        vision_config=vision,
    ).save_pretrained(folder)
    size = {"longest_edge": IMAGE_SIZE}
    SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size=size, max_image_size=size),
        tokenizer=fast,
        video_processor=SmolVLMVideoProcessor(
            size=size,
            max_image_size=size,
            video_sampling={"fps": 1, "max_frames": 4, "video_size": size},
            num_frames=4,
            fps=1,
            do_sample_frames=False,
        ),
        image_seq_len=(IMAGE_SIZE // PATCH_SIZE) ** 2,
    ).save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
