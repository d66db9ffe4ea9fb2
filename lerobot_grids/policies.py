"""Building the policy that a training run starts from, with its processors."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lerobot_policy_grids
from huggingface_hub import snapshot_download
from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import DeviceProcessorStep, RenameObservationsProcessorStep
from lerobot.utils.feature_utils import dataset_to_policy_features
from lerobot_policy_grids.adapters import get_adapter
from lerobot_policy_grids.checkpoint import WEIGHTS_FILE, load_weights, read_config, resolve_checkpoint
from lerobot_policy_grids.configuration_grids import GridsConfig
from lerobot_policy_grids.errors import BudgetError, CheckpointError, DatasetError, GridsError, UnsupportedPolicyError
from lerobot_policy_grids.modeling_grids import GridsPolicy, build, load_base

from .lora import merged_state_dict
from .recipes import base_type

Tokens = int | Literal["dense"]

# Family name -> where its dense policy comes from: a Hub id, or a configuration to start from random weights.
FAMILIES: dict[str, str | type[PreTrainedConfig]] = {
    "tiny": lerobot_policy_grids.TinySmolVLAConfig,
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

    def save(self, folder: Path) -> None:
        """Write configuration, weights and both processors, as LeRobot lays a checkpoint out."""
        self.policy.save_pretrained(folder, state_dict=merged_state_dict(self.policy))
        self.preprocessor.save_pretrained(folder)
        self.postprocessor.save_pretrained(folder)


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
        CheckpointError: If a folder holds no checkpoint or the Hub does not give it.
    """
    family = FAMILIES.get(source, source)
    if not isinstance(family, str):
        return family
    if Path(family).exists():
        return resolve_checkpoint(Path(family))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", family):
        raise UnsupportedPolicyError(
            f"policy '{source}' is unknown; give a family ({', '.join(FAMILIES)}), a checkpoint folder, "
            "or a Hub id like user/name"
        )
    try:
        return Path(snapshot_download(family, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the Hub client's errors share no base class
        cause = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"policy '{source}' is no folder here, and {family} cannot be fetched from the Hub: {cause}"
        ) from error


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
    tokens: Tokens,
    meta: LeRobotDatasetMetadata,
    *,
    reducer: str = "grids",
    condition_on: list[str] | None = None,
    num_tokens_max: int | None = None,
    rename_map: dict[str, str] | None = None,
) -> TrainablePolicy:
    """Build the policy to train, on the CPU, with processors that normalise by the dataset's statistics.

    Args:
        source: Family name, checkpoint folder or Hub id.
        tokens: Visual tokens per camera, or "dense" for the base policy as it is.
        meta: The dataset's metadata: features and statistics.
        reducer: How tokens are reduced.
        condition_on: What the coordinates depend on; None takes the configuration's default.
        num_tokens_max: Largest budget of the checkpoint; None takes `tokens`.
        rename_map: Dataset feature names to the policy's, where they differ.

    Raises:
        GridsError: If the policy, the budget and the dataset do not fit; the message says how.
    """
    rename_map = rename_map or {}
    features = {rename_map.get(key, key): value for key, value in dataset_to_policy_features(meta.features).items()}
    inputs = {k: v for k, v in features.items() if v.type in (FeatureType.VISUAL, FeatureType.STATE)}
    outputs = {k: v for k, v in features.items() if v.type is FeatureType.ACTION}

    found = find_source(source)
    folder = found if isinstance(found, Path) else None
    if isinstance(found, Path):
        config = read_config(found)
        get_adapter(base_type(config))
        _check_cameras(source, config, inputs)
    else:
        config = found(input_features=inputs, device="cpu")
    config.device = "cpu"
    config.output_features = outputs
    # A checkpoint is loaded from where it lies; where it came from means nothing elsewhere.
    config.pretrained_path = None

    policy: Any = build(config)
    if folder is not None and isinstance(policy, GridsPolicy):
        load_weights(policy, folder / WEIGHTS_FILE)
    elif folder is not None:
        load_base(policy, folder)
    if isinstance(policy, GridsPolicy):
        if tokens == "dense":
            raise BudgetError(f"{source} is a grids checkpoint; --tokens dense needs the dense policy it came from")
        policy.num_tokens = tokens
    elif tokens == "dense":
        if reducer != "grids":
            raise GridsError(f"--tokens dense keeps every token, so --reducer {reducer} has nothing to do; drop one")
    else:
        options: dict[str, Any] = {"condition_on": condition_on} if condition_on is not None else {}
        wrapper = GridsConfig(
            base=config, num_tokens=tokens, num_tokens_max=num_tokens_max, reducer=reducer, device="cpu", **options
        )
        policy = GridsPolicy(wrapper, base=policy)
    preprocessor, postprocessor = make_pre_post_processors(policy.config, dataset_stats=meta.stats)
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            step.rename_map = rename_map
    return TrainablePolicy(policy, preprocessor, postprocessor)


def _check_cameras(source: str, config: PreTrainedConfig, inputs: dict[str, Any]) -> None:
    wanted = [key for key in config.image_features if "empty_camera" not in key]
    have = [key for key, feature in inputs.items() if feature.type is FeatureType.VISUAL]
    missing = [key for key in wanted if key not in have]
    # A policy trained with three cameras may be given two of them, as LeRobot allows.
    if missing and not set(have) <= set(wanted):
        raise DatasetError(
            f"policy {source} looks through cameras {', '.join(wanted)}; the dataset has {', '.join(have)}. "
            f'Rename with --rename_map \'{{"{have[0]}": "{missing[0]}"}}\''
        )
