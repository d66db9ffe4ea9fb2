"""A character-level tokenizer on disk, for policies at small size that want to load one by its folder."""

from collections.abc import Sequence
from pathlib import Path

# Padding, end, beginning and unknown: the order in which a vocabulary has them first.
ROLES = ("pad_token", "eos_token", "bos_token", "unk_token")
CHARACTERS = tuple(chr(code) for code in range(32, 127))


def write_character_tokenizer(folder: Path, vocabulary: Sequence[str], markers: Sequence[str] = ()) -> Path:
    """Save a tokenizer that transformers can load, and return its folder.

    Args:
        folder: Where to; it is created.
        vocabulary: The tokens by id: one for each of `ROLES`, then characters and others.
        markers: Those of more than one character that are found in a text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = dict(zip(ROLES, vocabulary, strict=False))
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    more = {"additional_special_tokens": list(markers)} if markers else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **more).save_pretrained(folder)
    return folder
