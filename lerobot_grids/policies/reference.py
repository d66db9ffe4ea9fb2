"""Make a grids checkpoint of a published GridS one, whose sampler is among the weights of a dense policy.

Those of the paper's LeRobot tree have it as `model.token_sampler.scout_mlp.*` and `.coord_encoder.*`, two options in
config.json that LeRobot does not know, and the statistics of normalisation among the weights, where LeRobot before 0.4
had them. What is published of π0 and π0.5 are openpi's own checkpoints. They are JAX's, and all of their weights were
trained, so the whole policy must become a LeRobot policy first; its sampler may then have any prefix.
"""

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lerobot.configs import FeatureType, PreTrainedConfig
from torch import Tensor

from lerobot_policy_grids import GridsConfig, GridsPolicy
from lerobot_policy_grids.checkpoint import (
    atomic_folder,
    build,
    check_processors,
    check_published,
    find_checkpoint,
    is_published,
    read_config,
)
from lerobot_policy_grids.checkpoint.files import (
    CONFIG_FILE,
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    WEIGHTS_FILE,
    open_tensors,
    read_json,
)
from lerobot_policy_grids.checkpoint.weights import load_weights
from lerobot_policy_grids.errors import CheckpointError, NoConfigError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.processor_grids import make_processors
from lerobot_policy_grids.reducers.reference import CONVENTIONS, ReferenceConfig

from ..preflight import refuse_errors
from ..preflight.normalisation import check_normalisation
from .loaded import LoadedPolicy
from .loading import load_processors

# Options of the published trees that say whether there is a sampler, and its K.
SWITCH, COUNT = "use_grid_token_sampler", "grid_token_sampler_num_tokens"
HEAD = tuple(f"scout_mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))
GEOMETRY = tuple(f"coord_encoder.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))
# Statistics among the weights; some have the name of a robot in theirs.
STATISTICS = re.compile(r"(?:un)?normalize_(?:inputs|targets|outputs)\.(?:\w[\w-]*_)?buffer_(\w+)\.(\w+)")
ADVICE = "give a published GridS checkpoint of LeRobot as it is on the Hub"
OPENPI = (
    "published GridS weights of π0 and π0.5 are checkpoints of openpi in JAX, which cannot be imported before they are "
    "converted to a LeRobot policy with all their weights, and no converter is included"
)


@dataclass(frozen=True)
class Imported:
    """What was imported: LeRobot's policy type, K, and the convention of its coordinates."""

    policy_type: str
    num_tokens: int
    convention: str


@dataclass(frozen=True)
class _Sampler:
    """The sampler in a file: its prefix, K, and the widths of its MLPs."""

    prefix: str
    num_tokens: int
    hidden_width: int
    geometry_width: int


def import_reference(source: str, output: Path, convention: str | None = None) -> Imported:
    """Write a grids checkpoint with reducer `reference` from a published GridS checkpoint.

    Args:
        source: The published checkpoint, a folder or a Hub id: config.json, model.safetensors, perhaps processors.
        output: Folder to write; it must not exist.
        convention: "lerobot" or "openpi"; None takes that of the published checkpoints of the policy's type.

    Raises:
        CheckpointError: If the file has no sampler, its keys or shapes do not fit, or statistics are missing.
        UnsupportedPolicyError: If the policy's type is not supported.
        OutputExistsError: If `output` exists.
    """
    try:
        # Checked below, without the options that LeRobot does not know.
        folder = find_checkpoint(source, check=False)
    except NoConfigError as error:
        raise CheckpointError(f"{source} holds no {CONFIG_FILE} of a LeRobot policy; {OPENPI}") from error
    path = folder / WEIGHTS_FILE
    config, count = _read_config(folder)
    family = get_family(config.type)
    convention = convention or family.reference
    if convention is None:
        raise CheckpointError(
            f"{folder} has policy type '{config.type}', of which no GridS weights are published here; give "
            f"--convention {' or '.join(CONVENTIONS)}"
        )
    with open_tensors(path, ADVICE) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        statistics = {name: file.get_tensor(name) for name in shapes if STATISTICS.fullmatch(name)}
    sampler = _find_sampler(path, shapes)
    if count not in (None, sampler.num_tokens):
        raise CheckpointError(
            f"{path} has a sampler of {sampler.num_tokens} tokens, {CONFIG_FILE} says {count}; {ADVICE}"
        )
    reducer = ReferenceConfig(
        sampler.num_tokens,
        convention=convention,
        hidden_width=sampler.hidden_width,
        geometry_width=sampler.geometry_width,
    )
    with atomic_folder(output) as target:
        base = build(config)
        # As the published code numbers them.
        policy = GridsPolicy(
            GridsConfig(base=config, reducer=reducer, position_ids="consecutive", device="cpu"), base=base
        ).eval()
        own = {name for name in shapes if name.startswith(sampler.prefix)} | statistics.keys()
        load_weights(
            base,
            path,
            lambda names: family.checkpoint_names(base, [name for name in names if name not in own]),
            family.checkpoint_value,
        )
        parts = HEAD + (GEOMETRY if sampler.geometry_width else ())
        load_weights(policy.reducer, path, lambda _: {part: sampler.prefix + part for part in parts}, required="scout")
        processors = _processors(folder, config, statistics)
        LoadedPolicy(policy, *processors).save(target)
    return Imported(config.type, sampler.num_tokens, convention)


def _read_config(folder: Path) -> tuple[Any, int | None]:
    """(The dense policy's configuration, K if the file names it)."""
    path = folder / CONFIG_FILE
    content = read_json(path)
    kind = content.get("type")
    if kind is None:
        raise CheckpointError(f"{path} names no type of policy, as LeRobot's does; {OPENPI}")
    get_family(str(kind))
    switch, count = content.pop(SWITCH, True), content.pop(COUNT, None)
    if switch is not True:
        raise CheckpointError(f"{path} has {SWITCH}={switch}, so it is a dense policy; train it with lerobot-grids fit")
    known = {field.name for field in fields(PreTrainedConfig.get_choice_class(str(kind)))} | {"type"}
    unknown = sorted(content.keys() - known)
    if unknown:
        raise CheckpointError(
            f"{path} has options that this LeRobot's '{kind}' does not know: {', '.join(unknown)}; remove them, if the "
            "policy works without"
        )
    # Of the machine on which it was trained.
    content |= {"device": "cpu", "pretrained_path": None}
    with TemporaryDirectory() as scratch:
        (Path(scratch) / CONFIG_FILE).write_text(json.dumps(content))
        if is_published(folder):
            check_published(Path(scratch))
        return read_config(Path(scratch)), count


def _find_sampler(path: Path, shapes: dict[str, tuple[int, ...]]) -> _Sampler:
    prefixes = {name.removesuffix(HEAD[0]) for name in shapes if name.endswith(f".{HEAD[0]}")}
    if len(prefixes) != 1:
        seen = "no key ends" if not prefixes else f"{len(prefixes)} keys end"
        raise CheckpointError(f"{path} holds no GridS sampler: {seen} with .{HEAD[0]}; {ADVICE}")
    (prefix,) = prefixes
    found = {name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
    expected = {*HEAD, *(GEOMETRY if found & set(GEOMETRY) else ())}
    wrong = [f"lacks {prefix}{name}" for name in sorted(expected - found)]
    wrong += [f"has {prefix}{name}, which no published sampler has" for name in sorted(found - expected)]
    widths = {name: shapes.get(prefix + name, ()) for name in expected}
    flat = sorted(name for name, shape in widths.items() if len(shape) != (2 if name.endswith("weight") else 1))
    wrong += [f"has {prefix}{name} of shape {widths[name]}" for name in flat if prefix + name in shapes]
    if wrong:
        raise CheckpointError(f"{path} {wrong[0]}; {ADVICE}")
    coordinates, hidden = widths["scout_mlp.2.weight"]
    if coordinates % 2:
        raise CheckpointError(
            f"{path} has {prefix}scout_mlp.2.weight of {coordinates} rows, and K points have 2 K; {ADVICE}"
        )
    geometry = widths["coord_encoder.0.weight"][0] if GEOMETRY[0] in expected else 0
    return _Sampler(prefix, coordinates // 2, hidden, geometry)


def _processors(folder: Path, config: Any, weights: dict[str, Tensor]) -> tuple[Any, Any]:
    """Those beside the checkpoint, or made from the statistics among its weights."""
    if (folder / PREPROCESSOR_FILE).is_file() and (folder / POSTPROCESSOR_FILE).is_file():
        check_processors(folder)
        return load_processors(folder, config)
    named = {name.replace(".", "_"): name for name in (config.input_features | config.output_features)}
    statistics: dict[str, dict[str, Any]] = {}
    for name, value in weights.items():
        match = STATISTICS.fullmatch(name)
        assert match is not None
        feature = named.get(match[1])
        if feature is not None and bool(torch.isfinite(value).all()):
            statistics.setdefault(feature, {})[match[2]] = value.float()
    kinds = (FeatureType.STATE, FeatureType.ACTION)
    for name, feature in (config.input_features | config.output_features).items():
        if feature.type in kinds and name not in statistics:
            raise CheckpointError(
                f"{folder} has neither {PREPROCESSOR_FILE} nor statistics of '{name}' in {WEIGHTS_FILE}, and without "
                f"them its numbers mean nothing to a robot; {ADVICE}"
            )
    preprocessor, postprocessor = make_processors(config, statistics)
    refuse_errors(check_normalisation(preprocessor, postprocessor))
    return preprocessor, postprocessor
