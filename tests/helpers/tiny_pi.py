"""π0, π0.5 and π0-FAST at a hundred thousand parameters, offline.

LeRobot writes their sizes into the source: named Gemma variants, PaliGemma's vocabulary, projector and vision width.
Two module globals, replaced while a policy is constructed, are enough to make them small.
"""

import json
from contextlib import contextmanager
from pathlib import Path

from transformers import GemmaConfig, PaliGemmaConfig, PreTrainedTokenizerFast, SiglipVisionConfig

WIDTH, DEPTH, IMAGE_SIZE, PATCH_SIZE = 32, 2, 112, 14
VISION_WIDTH = 24
# Characters, a few named tokens and spares: ids that stand for FAST's action tokens.
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
VOCABULARY = [*SPECIAL, *(chr(code) for code in range(32, 127)), "Action", *(f"w{i}" for i in range(100))]


class Locked:
    """A configuration whose attributes `fixed` ignore assignments once it is locked."""

    fixed = frozenset()

    def __setattr__(self, name, value):
        if not (name in self.fixed and self.__dict__.get("_is_locked")):
            super().__setattr__(name, value)


class LockedVision(Locked, SiglipVisionConfig):
    fixed = frozenset({"intermediate_size", "projection_dim"})


class LockedText(Locked, GemmaConfig):
    fixed = frozenset({"vocab_size"})


def _paligemma_config():
    gemma = {
        "hidden_size": WIDTH,
        "vocab_size": len(VOCABULARY),
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": DEPTH,
        # LeRobot reshapes by a literal 8 heads.
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 2 * VISION_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": WIDTH,
        "vision_use_head": False,
    }
    config = PaliGemmaConfig(
        projection_dim=WIDTH,
        vision_config={"model_type": "siglip_vision_model", **vision},
        text_config={"model_type": "gemma", **gemma},
    )
    config.vision_config.__class__, config.text_config.__class__ = LockedVision, LockedText
    config.vision_config.__dict__["_is_locked"] = config.text_config.__dict__["_is_locked"] = True
    return config


# transformers recognises a configuration by its class's name; pickle finds it by its qualified name.
for _locked in (LockedVision, LockedText):
    _locked.__name__ = _locked.__mro__[2].__name__


@contextmanager
def tiny_sizes(module):
    """Inside, policies of a LeRobot `modeling_pi*` module are constructed small."""
    saved = module.get_gemma_config, module.CONFIG_MAPPING

    def variant(name):
        return module.GemmaConfig(width=WIDTH, depth=DEPTH, mlp_dim=2 * WIDTH, num_heads=8, num_kv_heads=1, head_dim=8)

    mapping = {
        "gemma": lambda **options: GemmaConfig(**{**options, "vocab_size": len(VOCABULARY)}),
        "paligemma": _paligemma_config,
    }
    module.get_gemma_config, module.CONFIG_MAPPING = variant, mapping
    try:
        yield
    finally:
        module.get_gemma_config, module.CONFIG_MAPPING = saved


def write_text_tokenizer(folder: Path) -> Path:
    """A character-level tokenizer that LeRobot can load by its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


FAST_TOKENIZER = """
import numpy as np
from scipy.fft import dct
from transformers.processing_utils import ProcessorMixin

class UniversalActionProcessor(ProcessorMixin):
    attributes = ["bpe_tokenizer"]
    bpe_tokenizer_class = "AutoTokenizer"

    def __init__(self, bpe_tokenizer=None, scale=10.0, vocab_size=64, min_token=0, **kwargs):
        self.scale, self.vocab_size, self.min_token = scale, vocab_size, min_token
        super().__init__(bpe_tokenizer)
"""


def write_fast_tokenizer(folder: Path) -> Path:
    """A stand-in for FAST's action tokenizer, which LeRobot loads with its code from a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "processing_action_tokenizer.py").write_text(FAST_TOKENIZER)
    write_text_tokenizer(folder)
    write_text_tokenizer(folder / "bpe_tokenizer")
    name = "UniversalActionProcessor"
    content = {
        "processor_class": name,
        "auto_map": {"AutoProcessor": f"processing_action_tokenizer.{name}"},
        "scale": 10.0,
        "vocab_size": 64,
        "min_token": -60,
    }
    (folder / "processor_config.json").write_text(json.dumps(content))
    return folder
