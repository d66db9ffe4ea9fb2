"""Building the policy that a training run starts from, with its processors."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import DeviceProcessorStep, RenameObservationsProcessorStep
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor

import lerobot_policy_grids
from lerobot_policy_grids.adapters import get_adapter
from lerobot_policy_grids.checkpoint import find_checkpoint, provenance, read_config, resolve_checkpoint
from lerobot_policy_grids.configuration_grids import GridsConfig
from lerobot_policy_grids.errors import BudgetError, DatasetError, GridsError, UnsupportedPolicyError
from lerobot_policy_grids.modeling_grids import GridsPolicy, build, load_checkpoint

from .lora import merged_state_dict
from .recipes import base_type

Tokens = int | Literal["dense"]

# Name -> where its dense policy comes from: a Hub id, a folder in the package, or a configuration to start from random
# weights.
FAMILIES: dict[str, str | Path | type[PreTrainedConfig]] = {
    "tiny": lerobot_policy_grids.TinySmolVLAConfig,
    "tiny_metaworld": Path(lerobot_policy_grids.__file__).parent / "tiny" / "metaworld",
    "smolvla": "lerobot/smolvla_base",
    "pi0": "lerobot/pi0_base",
    "pi05": "lerobot/pi05_base",
    "pi0_fast": "lerobot/pi0fast-base",
}


@dataclass
class TrainablePolicy:
    """A policy and the processors that belong to it."""

    policy: PreTrainedPolicy
    preprocessor: Any
    postprocessor: Any

    def to(self, device: str) -> None:
        """Move policy and pre-processor to a device; the configuration says where the policy was trained."""
        self.policy.to(device)
        self.policy.config.device = device.split(":")[0]
        for step in self.preprocessor.steps:
            if isinstance(step, DeviceProcessorStep):
                step.device = device
                step.__post_init__()

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write configuration, weights and both processors, as LeRobot lays a checkpoint out.

        Args:
            folder: Where to.
            state: The policy's state where it is sharded over processes and has been gathered.
        """
        self.policy.save_pretrained(folder, state_dict=merged_state_dict(self.policy, state))
        self.preprocessor.save_pretrained(folder)
        self.postprocessor.save_pretrained(folder)


def wrap(base: Any, num_tokens: int, reducer: str = "grids") -> GridsPolicy:
    """A grids policy with an untrained reducer around a dense policy, on its device.

    Raises:
        BudgetError: If the policy has fewer tokens than that.
        UnsupportedPolicyError: If the reducer cannot work in this family.
    """
    device = next(base.parameters()).device
    config = GridsConfig(base=base.config, num_tokens=num_tokens, reducer=reducer, device="cpu")
    config.device = str(device)
    with torch.device(device):
        policy = GridsPolicy(config, base=base)
    return policy.eval()


def set_resolution(source: str, config: PreTrainedConfig, side: int) -> None:
    """Let a dense policy see its images at a side of `side` pixels, before it is built.

    Raises:
        GridsError: If it is a grids checkpoint, whose reducer was made for one token grid.
    """
    if isinstance(config, GridsConfig):
        raise GridsError(f"{source} is a grids checkpoint, made for its own image size; drop --resolution")
    if side < 1:
        raise GridsError(f"--resolution {side}; give the side of a square in pixels")
    setattr(config, get_adapter(config.type).resolution_field, (side, side))


def parse_tokens(tokens: str | int) -> Tokens:
    """A token budget from a command line: a positive number, or "dense".

    Raises:
        BudgetError: If it is neither.
    """
    text = str(tokens).strip()
    if text == "dense":
        return "dense"
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise BudgetError(
            f"--tokens {text} is no token budget; give visual tokens per camera, such as 16, or 'dense' for all of them"
        )
    return int(text)


def find_source(source: str) -> type[PreTrainedConfig] | Path:
    """What `--policy` names: a configuration to start from, or the folder of a checkpoint (fetched if on the Hub).

    Raises:
        UnsupportedPolicyError: If it is no family, folder or Hub id.
        CheckpointError: If there is no checkpoint, or the Hub does not give it.
    """
    family = FAMILIES.get(source, source)
    if not isinstance(family, str):
        return resolve_checkpoint(family) if isinstance(family, Path) else family
    if family == source and not Path(source).exists() and "/" not in source:
        raise UnsupportedPolicyError(
            f"policy '{source}' is unknown; give a family ({', '.join(FAMILIES)}), a checkpoint folder, "
            "or a Hub id like user/name or user/name@revision"
        )
    return find_checkpoint(family)


def source_type(source: str) -> str:
    """LeRobot's type of the dense policy that `--policy` names, or of the one inside a grids checkpoint.

    Raises:
        UnsupportedPolicyError: If there is none, or no adapter for it.
        CheckpointError: If it cannot be read or fetched.
    """
    found = find_source(source)
    config = read_config(found) if isinstance(found, Path) else found(device="cpu")
    kind = base_type(config)
    get_adapter(kind)
    return kind


def build_policy(
    source: str,
    tokens: Tokens | None,
    meta: LeRobotDatasetMetadata,
    *,
    rename_map: dict[str, str] | None = None,
    gradient_checkpointing: bool = False,
    resolution: int | None = None,
    **options: Any,
) -> TrainablePolicy:
    """Build the policy to train, on the CPU, with processors that normalise by the dataset's statistics.

    Args:
        source: Family name, checkpoint folder or Hub id.
        tokens: Visual tokens per camera, or "dense" for the base policy as it is; None takes the default, or what a
            grids checkpoint has.
        meta: The dataset's metadata: features and statistics.
        rename_map: Dataset feature names to the policy's, where they differ.
        gradient_checkpointing: Whether activations are computed again in backward, for less memory.
        resolution: Side in pixels of the square that images are brought to; None keeps the policy's own.
        **options: Further fields of `GridsConfig`. None takes the default, or what a grids checkpoint has; a token
            budget that varies may use every token unless `num_tokens_max` says otherwise.

    Raises:
        GridsError: If the policy, the budget and the dataset do not fit; the message says how.
    """
    options = {name: value for name, value in options.items() if value is not None}
    rename_map = rename_map or {}
    features = _renamed(dataset_to_policy_features(meta.features), rename_map)
    inputs = {k: v for k, v in features.items() if v.type in (FeatureType.VISUAL, FeatureType.STATE)}
    outputs = {k: v for k, v in features.items() if v.type is FeatureType.ACTION}

    found = find_source(source)
    folder = found if isinstance(found, Path) else None
    if isinstance(found, Path):
        config = read_config(found)
        get_adapter(base_type(config))
        require_cameras(source, config, inputs)
        # The checkpoint's cameras at the size that they have in this dataset.
        config.input_features = {key: inputs.get(key, old) for key, old in config.input_features.items()}
    else:
        config = found(input_features=inputs, device="cpu")
    config.device = "cpu"
    config.output_features = outputs
    # A checkpoint is loaded from where it lies; where it came from means nothing elsewhere.
    config.pretrained_path = None
    _check_sizes(source, config)
    if gradient_checkpointing:
        if not hasattr(config, "gradient_checkpointing"):
            raise GridsError(f"LeRobot's '{base_type(config)}' has no gradient checkpointing; drop that option")
        config.gradient_checkpointing = True
    if resolution is not None:
        set_resolution(source, config, resolution)

    policy: Any = build(config)
    if resolution is not None:
        get_adapter(config.type).layout(policy)
    if folder is not None:
        load_checkpoint(policy, folder)
    if isinstance(policy, GridsPolicy):
        _continue(source, policy, tokens, options)
    elif tokens == "dense":
        useless = [f"{name}={value}" for name, value in options.items() if value not in ("grids", "constant")]
        if useless:
            raise GridsError(
                f"--tokens dense keeps every token, so {', '.join(useless)} would have nothing to do; drop one"
            )
    else:
        if folder is not None and (source_and_commit := provenance(folder)) is not None:
            options["base_repo_id"], options["base_revision"] = source_and_commit
        if options.get("token_budget", "constant") != "constant":
            options.setdefault("num_tokens_max", get_adapter(config.type).layout(policy).num_dense_tokens)
        if tokens is not None:
            options["num_tokens"] = tokens
        policy = GridsPolicy(GridsConfig(base=config, device="cpu", **options), base=policy)
    preprocessor, postprocessor = make_pre_post_processors(policy.config, dataset_stats=meta.stats)
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            step.rename_map = rename_map
    return TrainablePolicy(policy, preprocessor, postprocessor)


def _renamed(features: dict[str, Any], rename_map: dict[str, str]) -> dict[str, Any]:
    unknown = [name for name in rename_map if name not in features]
    if unknown:
        raise DatasetError(f"rename_map names {', '.join(unknown)}; the dataset has {', '.join(features)}")
    renamed = [rename_map.get(name, name) for name in features]
    twice = sorted({name for name in renamed if renamed.count(name) > 1})
    if twice:
        raise DatasetError(
            f"rename_map gives {', '.join(twice)} to two features of the dataset; give each its own name"
        )
    return dict(zip(renamed, features.values(), strict=True))


def _check_sizes(source: str, config: Any) -> None:
    base = config.base if isinstance(config, GridsConfig) else config
    for feature, field in ((config.robot_state_feature, "max_state_dim"), (config.action_feature, "max_action_dim")):
        limit = getattr(base, field, None)
        if feature is not None and limit is not None and feature.shape[0] > limit:
            kind, size = feature.type.value.lower(), feature.shape[0]
            raise DatasetError(
                f"the dataset's {kind} has {size} dimensions, and {source} takes at most {limit} ({field}); "
                "choose another policy, or a dataset with fewer"
            )


def _continue(source: str, policy: GridsPolicy, tokens: Tokens | None, options: dict[str, Any]) -> None:
    """Train a grids checkpoint on: its budgets may change, but not what it was built with."""
    config = policy.config
    if tokens == "dense":
        raise BudgetError(f"{source} is a grids checkpoint; --tokens dense needs the dense policy it came from")
    for name, value in options.items():
        has = config.max_tokens if name == "num_tokens_max" else getattr(config, name)
        if name != "token_budget" and value != has:
            raise GridsError(
                f"{source} was built with {name}={has}, not {value}; drop that option, or start from the dense policy"
            )
    if tokens is not None and policy.num_tokens > 0:
        policy.num_tokens = tokens
    config.token_budget, config.token_budget_step = options.get("token_budget", "constant"), 0
    policy.check_budget()


def require_cameras(source: str, config: PreTrainedConfig, inputs: dict[str, Any]) -> None:
    """Raise `DatasetError` unless a dataset's features (by name) hold the cameras that a policy looks through."""
    wanted = [key for key in config.image_features if "empty_camera" not in key]
    have = [key for key, feature in inputs.items() if feature.type is FeatureType.VISUAL]
    missing = [key for key in wanted if key not in have]
    # A policy trained with three cameras may be given two of them, as LeRobot allows.
    if missing and not set(have) <= set(wanted):
        raise DatasetError(
            f"policy {source} looks through cameras {', '.join(wanted)}; the dataset has {', '.join(have)}. "
            f'Rename with --rename_map \'{{"{have[0]}": "{missing[0]}"}}\''
        )
