"""Check a checkpoint that somebody else published before LeRobot or transformers reads it.

A processor's JSON can name any Python callable (`"class": "os.system"`), and LeRobot calls it while loading. Some
registered steps run code from any repository that the JSON names. So only what the lists below or the checkpoint's
family allow is loaded: file names, types and bounds of configuration fields, processor steps with their options, and
the few repositories that the family takes tokenizers from.
"""

import re
from pathlib import Path
from typing import Any

from lerobot.configs import PreTrainedConfig

from ..configuration_grids import GRIDS_TYPE
from ..errors import CheckpointError
from ..families import Family, families
from ..reducers import ReducerConfig
from ..schedule import LONGEST_RUN
from .field_types import fits, types_of
from .files import (
    CONFIG_FILE,
    MANIFEST_FILE,
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    STATE_FILE,
    TOKENIZER_FOLDER,
    read_json,
    size_limit,
)
from .manifest import COMMIT, REPOSITORY, read_manifest

_NORMALIZER = frozenset({"eps", "features", "norm_map", "normalize_observation_keys"})
# Processor steps of all families and their options. A family adds its own.
STEPS: dict[str, frozenset[str]] = {
    "rename_observations_processor": frozenset({"rename_map"}),
    "to_batch_processor": frozenset(),
    "tokenizer_processor": frozenset(
        {"max_length", "task_key", "padding_side", "padding", "truncation", "tokenizer_name"}
    ),
    "device_processor": frozenset({"device", "float_dtype"}),
    "normalizer_processor": _NORMALIZER,
    "unnormalizer_processor": _NORMALIZER,
    "relative_actions_processor": frozenset({"enabled", "exclude_joints", "action_names"}),
    "absolute_actions_processor": frozenset({"enabled"}),
}
# A step without the name of its tokenizer would take one from another source, and run its code.
REQUIRED_OPTIONS = {"action_tokenizer_processor": "action_tokenizer_name", "tokenizer_processor": "tokenizer_name"}

# The option that names a step's tokenizer, and the step whose tokenizer may be in the checkpoint.
TOKENIZER_OPTION, TOKENIZER_STEP = "tokenizer_name", "tokenizer_processor"

# No size, count or width of a supported policy is larger, unless a bound below says so.
LARGEST = 2**13
# Fields, and keys inside them, with a bound of their own. A policy within all bounds is built in seconds, and has not
# many times the memory of a published one.
BOUNDS: dict[str, float] = {
    # Pixels of a side.
    "image_resolution": 2048,
    "resize_imgs_with_padding": 2048,
    # Pixels of an image.
    "image_min_pixels": 2**22,
    "image_max_pixels": 2**22,
    "input_features": 4096,
    # Counts.
    "num_tokens": 4096,
    "num_tokens_max": 4096,
    "camera_tokens": 4096,
    "empty_cameras": 16,
    "num_image_views": 16,
    "num_steps": 1000,
    "num_inference_steps": 1000,
    "num_denoising_steps": 1000,
    "num_domains": 128,
    "len_soft_prompts": 512,
    # Layers.
    "num_vlm_layers": 64,
    "language_layers": 64,
    "num_expert_layers": 64,
    "depth": 48,
    "depths": 32,
    "n_encoder_layers": 32,
    "n_decoder_layers": 32,
    "n_vae_encoder_layers": 32,
    "encoder_layers": 32,
    "num_hidden_layers": 96,
    "decoder_layers": 32,
    # Widths.
    "expert_width_multiplier": 2,
    "mlp_ratio": 8,
    "hidden_size": 2048,
    "max_state_dim": 512,
    "max_action_dim": 512,
    "dim_time": 512,
    "d_model": 2048,
    "dim_model": 2048,
    "embed_dim": 4096,
    "projection_dim": 4096,
    "out_hidden_size": 4096,
    "intermediate_size": 2**14,
    # Holds numbers of tokens in a vocabulary.
    "florence_config": 2**16,
    # And positions, and the base of their angles.
    "vlm_config": 2**23,
    "vocab_size": 2**19,
    # Training steps.
    "schedule_steps": LONGEST_RUN,
    "max_steps": LONGEST_RUN,
}
# Rates and step counts of training, which building a policy does not use.
TRAINING = ("optimizer_", "scheduler_")
LONGEST_TEXT = 1000

REFUSED = "not loaded; use another checkpoint, or ask its author to push it again with `lerobot-grids push`"


def check_published(folder: Path) -> None:
    """Raise `CheckpointError` unless a published checkpoint holds only what a checkpoint needs.

    Weights are not read here: safetensors cannot hold code, and `load_weights` checks names and shapes. The processors
    of a dense policy are not read either: training makes new ones, and inference calls `check_processors`.

    Args:
        folder: A pulled folder, or a snapshot in the Hub's cache.
    """
    for path in sorted(folder.rglob("*")):
        _check_file(folder, path)
    path = folder / CONFIG_FILE
    content = read_json(path)
    _check_config(path, content)
    if content["type"] == GRIDS_TYPE:
        _check_base(folder, content)
        check_processors(folder)


def check_processors(folder: Path) -> None:
    """Raise `CheckpointError` unless both processors of a published checkpoint have only steps of its family."""
    path = folder / CONFIG_FILE
    family = _family_of(path, read_json(path))
    for name in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE):
        _check_processor(folder, folder / name, family)


def _family_of(path: Path, content: dict[str, Any]) -> Family:
    kind, base, known = content.get("type"), content.get("base"), families()
    if kind == GRIDS_TYPE:
        if not isinstance(base, dict) or base.get("type") not in known:
            raise CheckpointError(f"{path} has no base policy of a supported type; {REFUSED}")
        return known[base["type"]]
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(
            f"{path} has type {kind!r}, expected one of {', '.join(sorted((GRIDS_TYPE, *known)))}; {REFUSED}"
        )
    return known[kind]


def _check_file(folder: Path, path: Path) -> None:
    name = path.relative_to(folder).as_posix()
    limit = size_limit(name)
    if name.startswith(TOKENIZER_FOLDER) and limit is None and not path.is_dir():
        raise CheckpointError(f"{path} is not a file of a tokenizer; {REFUSED}")
    if limit is None:
        return  # never opened
    # A snapshot in the Hub's cache has links to files in the folder `blobs`.
    homes = [folder.resolve(), folder.resolve() / TOKENIZER_FOLDER]
    if folder.parent.name == "snapshots":
        homes.append((folder.parent.parent / "blobs").resolve())
    if not path.is_file() or path.resolve().parent not in homes:
        raise CheckpointError(f"{path} is not a file of its own folder; {REFUSED}")
    if path.stat().st_size > limit:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, expected at most {limit}; {REFUSED}")


def _check_config(path: Path, content: dict[str, Any]) -> None:
    family = _family_of(path, content)
    _check_fields(path, content, PreTrainedConfig.get_choice_class(content["type"]), family)
    if content["type"] != GRIDS_TYPE:
        return
    base = content["base"]
    _check_fields(path, base, PreTrainedConfig.get_choice_class(base["type"]), family)
    reducer, reducers = content.get("reducer"), ReducerConfig.get_known_choices()
    if not isinstance(reducer, dict) or reducer.get("type") not in reducers:
        raise CheckpointError(f"{path} has reducer {reducer!r}, expected one of {', '.join(reducers)}; {REFUSED}")
    _check_fields(path, reducer, reducers[reducer["type"]], family)
    for config in (content, base):
        for name in ("pretrained_path", "pretrained_revision"):
            if config.get(name) is not None:
                raise CheckpointError(f"{path} has {name}={config[name]!r}, expected null; {REFUSED}")
    for name, pattern in (("base_repo_id", REPOSITORY), ("base_revision", COMMIT)):
        value = content.get(name)
        if value is not None and (not isinstance(value, str) or not pattern.fullmatch(value)):
            raise CheckpointError(f"{path} has {name}={value!r}, expected {pattern.pattern}; {REFUSED}")


def _check_base(folder: Path, content: dict[str, Any]) -> None:
    """An adapter's base is in its configuration, which people read, and in its manifest, which is loaded."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.base is None:
        return
    expected = {"base_repo_id": manifest.base.repo_id, "base_revision": manifest.base.revision}
    for name, value in expected.items():
        if content.get(name) != value:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} has {name}={content.get(name)!r}, expected {value!r} as in {MANIFEST_FILE}; "
                f"{REFUSED}"
            )


def _check_fields(path: Path, content: dict[str, Any], kind: type, family: Family) -> None:
    """Check exact types and bounds: draccus reads the text "32" as a number, and has no bounds."""
    if content.get("use_peft"):
        raise CheckpointError(f"{path} has use_peft=true, which makes LeRobot look for another base; {REFUSED}")
    types = types_of(kind)
    unknown = sorted(content.keys() - types.keys() - {"type"})
    if unknown:
        raise CheckpointError(
            f"{path} has fields that type '{content['type']}' does not know, {', '.join(unknown)}; {REFUSED}"
        )
    for name, value in content.items():
        if name in ("type", "base", "reducer"):
            continue
        if not fits(value, types[name]):
            expected = types[name].__name__ if isinstance(types[name], type) else types[name]
            raise CheckpointError(f"{path} has {name}={value!r}, expected {expected}; {REFUSED}")
        _check_value(path, name, value, family)


def _check_value(path: Path, name: str, value: Any, family: Family) -> None:
    """Check the bounds of every value in a field or an option, and the repositories that it names."""
    # Without a list in the family, no repository is allowed.
    allowed = family.repositories.get(name, frozenset() if name in REQUIRED_OPTIONS.values() else None)
    if allowed is not None and value not in allowed:
        expected = ", ".join(sorted(map(str, allowed)))
        raise CheckpointError(f"{path} has {name}={value!r}, expected one of {expected}; {REFUSED}")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_value(path, name, key, family)
            _check_value(path, key if key in BOUNDS or key in family.repositories else name, item, family)
    elif isinstance(value, list):
        for item in value:
            _check_value(path, name, item, family)
    elif isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise CheckpointError(f"{path} has {len(value)} characters in {name}, expected {LONGEST_TEXT}; {REFUSED}")
    elif isinstance(value, (int, float)) and abs(value) > bound_of(name):
        raise CheckpointError(f"{path} has {name}={value}, expected at most {bound_of(name)}; {REFUSED}")


def bound_of(name: str) -> float:
    """Largest number in a field or an option, positive or negative."""
    return LONGEST_RUN if name.startswith(TRAINING) else BOUNDS.get(name, LARGEST)


def _check_processor(folder: Path, path: Path, family: Family) -> None:
    content = read_json(path)
    steps = content.get("steps")
    if content.keys() - {"name", "steps"} or not isinstance(steps, list) or len(steps) > 20:
        raise CheckpointError(f"{path} is not a processor of a policy, which has a name and steps; {REFUSED}")
    for step in steps:
        if not isinstance(step, dict) or step.keys() - {"registry_name", "config", "state_file", "artifacts"}:
            raise CheckpointError(
                f"{path} has a step with {sorted(step) if isinstance(step, dict) else step!r}, expected registry_name, "
                f"config and state_file; anything else can run code, {REFUSED}"
            )
        _check_step(folder, path, step, family)


def _check_step(folder: Path, path: Path, step: dict[str, Any], family: Family) -> None:
    known = {**STEPS, **family.steps}
    name, options = step.get("registry_name"), step.get("config", {})
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"{path} has the step {name!r}, which '{family.policy_type}' does not use; {REFUSED}")
    if not isinstance(options, dict) or options.keys() - known[name]:
        seen = ", ".join(sorted(options)) if isinstance(options, dict) else repr(options)
        raise CheckpointError(
            f"{path}: step '{name}' has {seen}, expected {', '.join(sorted(known[name])) or 'no options'}; {REFUSED}"
        )
    if REQUIRED_OPTIONS.get(name, "") not in ("", *options):
        raise CheckpointError(f"{path}: step '{name}' lacks {REQUIRED_OPTIONS[name]}; {REFUSED}")
    if "artifacts" in step:
        _check_tokenizer(folder, path, step)
        options = {option: value for option, value in options.items() if option != TOKENIZER_OPTION}
    for option, value in options.items():
        _check_value(path, option, value, family)
    if "state_file" in step:
        state = step["state_file"]
        if not isinstance(state, str) or not re.fullmatch(STATE_FILE, state) or not (folder / state).is_file():
            raise CheckpointError(
                f"{path}: step '{name}' has state_file {state!r}, expected a file beside it that is named "
                f"like policy_preprocessor_step_3_normalizer_processor.safetensors; {REFUSED}"
            )


def _check_tokenizer(folder: Path, path: Path, step: dict[str, Any]) -> None:
    """Check a tokenizer in the checkpoint: it must be in its own folder and name no code."""
    named = step.get("config", {}).get(TOKENIZER_OPTION)
    if step["registry_name"] != TOKENIZER_STEP or step["artifacts"] != {TOKENIZER_OPTION: TOKENIZER_FOLDER}:
        raise CheckpointError(
            f"{path}: step '{step['registry_name']}' has artifacts {step['artifacts']!r}, expected the folder "
            f"'{TOKENIZER_FOLDER}' of a {TOKENIZER_STEP}; {REFUSED}"
        )
    settings = folder / TOKENIZER_FOLDER / "tokenizer_config.json"
    if named != TOKENIZER_FOLDER or not settings.is_file():
        raise CheckpointError(
            f"{path}: its tokenizer is {named!r}, expected '{TOKENIZER_FOLDER}', with {settings.name} in it; {REFUSED}"
        )
    if "auto_map" in read_json(settings):
        raise CheckpointError(f"{settings} has auto_map, which names code to run; {REFUSED}")
