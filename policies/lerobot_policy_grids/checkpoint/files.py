"""The files that a checkpoint may hold, and safe readers for JSON and tensors from other people."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Only the trained tensors, for a checkpoint that names its base policy.
ADAPTER_FILE = "grids_adapter.safetensors"
WEIGHTS_FILES = (WEIGHTS_FILE, ADAPTER_FILE)
MANIFEST_FILE = "grids_manifest.json"
PREPROCESSOR_FILE = "policy_preprocessor.json"
POSTPROCESSOR_FILE = "policy_postprocessor.json"
CARD_FILE = "README.md"
PICTURE_FILE = "looks.png"
# Options of the training run, beside a checkpoint that `fit` made.
OPTIONS_FILE = "fit.yaml"

# Newer LeRobot saves a processor's tokenizer beside it.
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    }
)

STATE_FILE = re.compile(r"policy_(pre|post)processor_step_\d{1,3}_[a-z0-9_]{1,80}\.safetensors")

MIB = 2**20
# Largest size in bytes of each small file.
SIZE_LIMITS = {
    CONFIG_FILE: MIB,
    MANIFEST_FILE: MIB,
    PREPROCESSOR_FILE: MIB,
    POSTPROCESSOR_FILE: MIB,
    CARD_FILE: MIB,
    PICTURE_FILE: 20 * MIB,
}
STATE_LIMIT = 64 * MIB
TOKENIZER_LIMIT = 128 * MIB
WEIGHTS_LIMIT = 64 * 1024 * MIB

# Shown and edited on the Hub; inference does not need them.
SHOWN = (CARD_FILE, PICTURE_FILE)
# Files that loading needs, as wildcards for the Hub's client.
LOADED = [
    CONFIG_FILE,
    MANIFEST_FILE,
    PREPROCESSOR_FILE,
    POSTPROCESSOR_FILE,
    WEIGHTS_FILE,
    ADAPTER_FILE,
    "policy_*processor_step_*.safetensors",
    f"{TOKENIZER_FOLDER}/*",
]

# More levels than any configuration has, and far below Python's recursion limit.
MAX_DEPTH = 16


def size_limit(name: str) -> int | None:
    """Largest size in bytes of the file at this path inside a checkpoint; None if a checkpoint has no such file."""
    folder, _, file = name.rpartition("/")
    if folder:
        return TOKENIZER_LIMIT if folder == TOKENIZER_FOLDER and file in TOKENIZER_FILES else None
    if name in WEIGHTS_FILES:
        return WEIGHTS_LIMIT
    return STATE_LIMIT if STATE_FILE.fullmatch(name) else SIZE_LIMITS.get(name)


def names_in(folder: Path) -> list[str]:
    """Sorted paths, relative to a checkpoint folder, of its files that a checkpoint may hold."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if size_limit(name) is not None)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        CheckpointError: If the file is missing, larger than `SIZE_LIMITS` allows, too deeply nested, or not an object.
    """
    limit = SIZE_LIMITS.get(path.name, MIB)
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected at most {limit}; do not use it")
        content = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite_number,
            object_pairs_hook=_without_duplicates,
        )
    except RecursionError:
        raise CheckpointError(f"{path} is nested deeper than any checkpoint file; do not use it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}); restore the checkpoint from its source"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(content).__name__}, expected an object; restore the checkpoint from its source"
        )
    if _depth(content) > MAX_DEPTH:
        raise CheckpointError(f"{path} is nested deeper than {MAX_DEPTH} levels; do not use it")
    return content


@contextmanager
def open_tensors(path: Path, advice: str, shown: str | Path | None = None) -> Iterator[Any]:
    """Open a safetensors file for the duration of the block; its tensors are read one by one.

    Args:
        path: The file.
        advice: What the user should do if it is damaged.
        shown: How the message names the file. None takes its path.

    Yields:
        The open file, with `keys()` and `get_tensor(name)`.

    Raises:
        CheckpointError: If it cannot be opened, or a read in the block fails.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shown or path} cannot be read ({error}); {advice}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite_number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is too large")
    return float(text)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two values, programs disagree about which one counts.
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in content if names.count(name) > 1)!r} is there twice")
    return content


def _depth(value: Any) -> int:
    # A loop, because a deeply nested file would exceed the recursion limit.
    depth, level = 0, [value]
    while level:
        depth += 1
        children = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [child for group in children for child in group]
    return depth
