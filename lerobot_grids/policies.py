"""Policies with their processors: loaded to act, or built to be trained."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import (
    DeviceProcessorStep,
    NormalizerProcessorStep,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
    rename_stats,
)
from lerobot.utils.constants import ACTION
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor

from lerobot_policy_grids import GridsConfig, GridsPolicy, compress
from lerobot_policy_grids.checkpoint import (
    CHECKPOINT_FOLDER,
    build,
    check_processors,
    find_checkpoint,
    is_published,
    load_checkpoint,
    provenance,
    read_config,
    resolve_checkpoint,
)
from lerobot_policy_grids.checkpoint.files import TOKENIZER_FOLDER
from lerobot_policy_grids.checkpoint.find import require_complete
from lerobot_policy_grids.checkpoint.save import save_policy, save_processors
from lerobot_policy_grids.checkpoint.statistics import check_statistics, find_fault
from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import BudgetError, CheckpointError, DatasetError, GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families import families, get_family
from lerobot_policy_grids.processor_grids import make_processors
from lerobot_policy_grids.reducers import ReducerConfig, reducer_config

Tokens = int | Literal["dense"]


@dataclass
class LoadedPolicy:
    """A policy and its processors.

    Attributes:
        policy: Dense or grids.
        preprocessor: From observations in LeRobot's names to the policy's batch.
        postprocessor: From the policy's actions to the robot's.
        reducer: Name of the reducer that was put into a dense policy without training; empty for none.
        resolution: Side in pixels at which a dense policy sees its images without training; None for its own.
    """

    policy: Any
    preprocessor: Any
    postprocessor: Any
    reducer: str = ""
    resolution: int | None = None

    @property
    def renames(self) -> dict[str, str]:
        """Names of observations to the policy's, where its pre-processor changes them."""
        renames: dict[str, str] = {}
        for step in self.preprocessor.steps:
            renames |= getattr(step, "rename_map", {})
        return renames

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
            folder: Where to; it must exist.
            state: The policy's state, where it is not what `policy.state_dict()` gives.
        """
        save_policy(self.policy, folder, state)
        save_processors(folder, self.preprocessor, self.postprocessor)


def load(
    source: str | Path,
    device: str | None = None,
    num_tokens: int | None = None,
    *,
    rename_map: dict[str, str] | None = None,
    n_action_steps: int | None = None,
    reducer: str | ReducerConfig | None = None,
    resolution: int | None = None,
    verify: bool = False,
) -> LoadedPolicy:
    """Load a checkpoint strictly, dense or grids, with the processors that were saved beside it, ready to act.

    Args:
        source: Checkpoint folder, output folder of a run, or Hub id.
        device: Where it runs; None keeps the checkpoint's, or what this machine has.
        num_tokens: Run-time budget of a grids checkpoint, or of `reducer`.
        rename_map: Names of the environment's observations to the policy's; None keeps the checkpoint's.
        n_action_steps: Steps of each action chunk that are executed before the policy looks again; None keeps the
            checkpoint's.
        reducer: Reduce the tokens of a dense checkpoint so, without training.
        resolution: Side in pixels at which a dense checkpoint sees its images, without training.
        verify: Hash every file that a manifest names, also those that have not changed since they were hashed last.

    Raises:
        CheckpointError: If the checkpoint is incomplete or does not fit.
        GridsError: If the policy's chunks are shorter than `n_action_steps`, or it has none.
    """
    folder = find_weights(str(source))
    require_complete(folder)
    config = read_config(folder)
    if device is not None:
        config.device = checked_device(device)
    if num_tokens is not None and not isinstance(config, GridsConfig) and reducer is None:
        raise CheckpointError(
            f"{source} is a dense '{config.type}' policy, which has no token budget to set; drop --tokens, or say with "
            "--reducer how its tokens should be reduced without training"
        )
    if reducer is not None and isinstance(config, GridsConfig):
        raise CheckpointError(f"{source} was trained with reducer '{config.reducer.type}'; drop --reducer")
    policy = _build(str(source), config, resolution)
    load_checkpoint(policy, folder, verify=verify)
    if reducer is not None:
        policy = compress(policy, num_tokens, reducer)
    elif num_tokens is not None:
        policy.num_tokens = num_tokens
    if n_action_steps is not None:
        _set_action_steps(policy, n_action_steps)
    policy.to(config.device)
    policy.eval()
    name = policy.config.reducer.type if reducer is not None else ""
    return LoadedPolicy(policy, *load_processors(folder, config, rename_map), name, resolution)


def start(
    source: str,
    tokens: Tokens | None,
    meta: LeRobotDatasetMetadata,
    *,
    reducer: str | dict[str, Any] | ReducerConfig | None = None,
    schedule: str = "constant",
    position_ids: str | None = None,
    rename_map: dict[str, str] | None = None,
    gradient_checkpointing: bool = False,
    resolution: int | None = None,
) -> LoadedPolicy:
    """Build the policy to train, on the CPU, with processors that normalise by the dataset's statistics.

    Args:
        source: What to start from: a name of a family, a checkpoint folder or a Hub id.
        tokens: Visual tokens per camera, or "dense" for the base policy as it is; None takes the reducer's default, or
            what a grids checkpoint has.
        meta: The dataset's metadata: features and statistics.
        reducer: How tokens are reduced: a name, {"type": name, option: value, ...}, or a configuration. None takes
            "grids", or what a grids checkpoint has.
        schedule: K over the training steps. One that varies may use every token unless the reducer's `num_tokens_max`
            says otherwise.
        position_ids: How the trunk numbers visual tokens; None takes what suits the family, or what a grids
            checkpoint has.
        rename_map: Dataset feature names to the policy's, where they differ.
        gradient_checkpointing: Whether activations are computed again in backward, for less memory.
        resolution: Side in pixels of the square that images are brought to; None keeps the policy's own.

    Raises:
        GridsError: If the policy, the budget and the dataset do not fit; the message says how.
    """
    rename_map = rename_map or {}
    features = _renamed(dataset_to_policy_features(meta.features), rename_map)
    inputs = {k: v for k, v in features.items() if v.type in (FeatureType.VISUAL, FeatureType.STATE)}
    outputs = {k: v for k, v in features.items() if v.type is FeatureType.ACTION}
    asked = _asked_reducer(reducer)

    folder = find_source(source)
    if folder is not None:
        config = read_config(folder)
        get_family(base_config(config).type)
        require_cameras(source, config, inputs)
        # The checkpoint's cameras at the size that they have in this dataset.
        config.input_features = {key: inputs.get(key, old) for key, old in config.input_features.items()}
    else:
        config = PreTrainedConfig.get_choice_class(source_type(source))(input_features=inputs, device="cpu")
    config.device = "cpu"
    config.output_features = outputs
    # A local folder, which another machine does not have.
    config.pretrained_path = None
    _describe_robot(base_config(config), meta)
    _check_sizes(source, config)
    if gradient_checkpointing:
        if not hasattr(config, "gradient_checkpointing"):
            raise GridsError(f"LeRobot's '{base_config(config).type}' has no gradient checkpointing; drop that option")
        config.gradient_checkpointing = True

    policy = _build(source, config, resolution)
    if folder is not None:
        load_checkpoint(policy, folder)
    if isinstance(policy, GridsPolicy):
        _continue(source, policy, tokens, asked, schedule, position_ids)
    elif tokens == "dense":
        given = {"reducer": reducer, "schedule": None if schedule == "constant" else schedule}
        useless = [f"{n}={v}" for n, v in (given | {"position_ids": position_ids}).items() if v is not None]
        if useless:
            raise GridsError(
                f"--tokens dense keeps every token, so {', '.join(useless)} would have nothing to do; drop one"
            )
    else:
        policy = _wrap(policy, folder, tokens, asked, schedule, position_ids)
    preprocessor, postprocessor = make_processors(policy.config, rename_stats(meta.stats, rename_map), meta)
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            step.rename_map = rename_map
    for step in (*preprocessor.steps, *postprocessor.steps):
        _check_normalisation(step)
    return LoadedPolicy(policy, preprocessor, postprocessor)


def _check_normalisation(step: Any) -> None:
    if not isinstance(step, (NormalizerProcessorStep, UnnormalizerProcessorStep)):
        return
    features = {name: (feature.type.value, tuple(feature.shape)) for name, feature in step.features.items()}
    modes = {kind.value: mode.value for kind, mode in step.norm_map.items()}
    fault = find_fault(features, modes, step.stats or {})
    if fault is not None:
        # LeRobot's own command adds quantiles to a dataset that was recorded without.
        advice = "compute the dataset's statistics again"
        if "'q" in fault:
            advice = "add them with: python -m lerobot.scripts.augment_dataset_quantile_stats --repo-id=USER/DATASET"
        raise DatasetError(f"the dataset's statistics: normalisation {fault}; {advice}")


def _build(source: str, config: PreTrainedConfig, resolution: int | None) -> Any:
    if resolution is None:
        return build(config)
    if isinstance(config, GridsConfig):
        raise GridsError(f"{source} is a grids checkpoint, made for its own image size; drop --resolution")
    if resolution < 1:
        raise GridsError(f"--resolution {resolution}; give the side of a square in pixels")
    family = get_family(config.type)
    setattr(config, family.resolution_field, (resolution, resolution))
    policy = build(config)
    # Before a forward pass fails on an image that gives no whole grid.
    family.layout(policy)
    return policy


def _asked_reducer(reducer: str | dict[str, Any] | ReducerConfig | None) -> dict[str, Any]:
    """What was asked of the reducer: {"type": name, option: value, ...}; options that were left out are not there."""
    if reducer is None:
        return {}
    if isinstance(reducer, ReducerConfig):
        return {"type": reducer.type, **vars(reducer)}
    return {"type": reducer} if isinstance(reducer, str) else {k: v for k, v in reducer.items() if v is not None}


def _wrap(
    policy: Any,
    folder: Path | None,
    tokens: int | None,
    asked: dict[str, Any],
    schedule: str,
    position_ids: str | None,
) -> GridsPolicy:
    options = {"type": "grids", **asked}
    if tokens is not None and options["type"] == "blind":
        raise GridsError(f"--tokens {tokens}, but reducer 'blind' keeps none; drop one of the two")
    if tokens is not None:
        options.setdefault("num_tokens", tokens)
        if options["num_tokens"] != tokens:
            raise GridsError(f"--tokens {tokens} with a reducer of {options['num_tokens']}; give K once")
    if schedule != "constant":
        dense_tokens = get_family(policy.config.type).layout(policy).num_dense_tokens
        options.setdefault("num_tokens_max", dense_tokens)
    reducer = reducer_config(options.pop("type"), **options)
    origin = provenance(folder) if folder is not None else None
    repo_id, revision = origin or (None, None)
    config = GridsConfig(
        base=policy.config,
        reducer=reducer,
        position_ids=position_ids,
        schedule=schedule,
        base_repo_id=repo_id,
        base_revision=revision,
        device="cpu",
    )
    return GridsPolicy(config, base=policy)


def _continue(
    source: str,
    policy: GridsPolicy,
    tokens: Tokens | None,
    asked: dict[str, Any],
    schedule: str,
    position_ids: str | None,
) -> None:
    """Train a grids checkpoint on: its budget and schedule may change, but not what it was built with."""
    config = policy.config
    if tokens == "dense":
        raise BudgetError(f"{source} is a grids checkpoint; --tokens dense needs the dense policy it came from")
    has = {"type": config.reducer.type, **vars(config.reducer), "num_tokens_max": config.reducer.largest}
    wanted = asked | ({} if position_ids is None else {"position_ids": position_ids})
    for name, value in wanted.items():
        before = config.position_ids if name == "position_ids" else has.get(name)
        if name != "num_tokens" and value != before:
            raise GridsError(
                f"{source} was built with {'reducer' if name == 'type' else name}={before}, not {value}; drop that "
                "option, or start from the dense policy"
            )
    budget = asked.get("num_tokens", tokens)
    if budget is not None and policy.num_tokens > 0:
        policy.num_tokens = budget
    config.schedule = schedule
    policy.follow_schedule(0)
    policy.check_schedule()


def _set_action_steps(policy: Any, steps: int) -> None:
    config = base_config(policy.config)
    longest = getattr(config, "chunk_size", None)
    if longest is None or not hasattr(config, "n_action_steps"):
        raise GridsError(f"a '{config.type}' policy does not act in chunks; drop --n_action_steps")
    if not 1 <= steps <= longest:
        raise GridsError(f"--n_action_steps {steps}; the policy's chunks have {longest} steps, so give 1 .. {longest}")
    config.n_action_steps = steps


def load_processors(folder: Path, config: Any, rename_map: dict[str, str] | None = None) -> tuple[Any, Any]:
    """The (pre-processor, post-processor) that were saved beside a checkpoint.

    Raises:
        CheckpointError: If they cannot be built or cannot normalise, or came from the Hub and hold what could run
            code.
    """
    # Those of a grids checkpoint were checked when it was found.
    if is_published(folder) and not isinstance(config, GridsConfig):
        check_processors(folder)
    check_statistics(folder)
    overrides: dict[str, dict[str, Any]] = {"device_processor": {"device": str(config.device)}}
    if rename_map is not None:
        overrides["rename_observations_processor"] = {"rename_map": rename_map}
    if (folder / TOKENIZER_FOLDER).is_dir():
        # Releases that do not know of this folder would look for its name on the Hub.
        overrides["tokenizer_processor"] = {"tokenizer_name": str(folder / TOKENIZER_FOLDER)}
    try:
        pre, post = make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=overrides)
    except Exception as error:  # LeRobot raises whatever its steps meet
        raise CheckpointError(
            f"the processors in {folder} cannot be built: {error}; copy the checkpoint again"
        ) from error
    return pre, post


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


def sources() -> dict[str, str | Path | None]:
    """What `--policy` may be besides a folder or a Hub id: names, and where each one's dense policy comes from."""
    return {name: place for family in families().values() for name, place in family.sources.items()}


def find_source(source: str) -> Path | None:
    """The folder of the checkpoint that `--policy` names, fetched if on the Hub; None for one that has no weights yet.

    Raises:
        UnsupportedPolicyError: If it is no family, folder or Hub id.
        CheckpointError: If there is no checkpoint, or the Hub does not give it.
    """
    known = sources()
    if source not in known and not Path(source).exists() and "/" not in source:
        raise UnsupportedPolicyError(
            f"policy '{source}' is unknown; give a family ({', '.join(known)}), a checkpoint folder, "
            "or a Hub id like user/name or user/name@revision"
        )
    place = known.get(source, source)
    if isinstance(place, Path):
        return resolve_checkpoint(place)
    return None if place is None else find_checkpoint(place)


def find_weights(source: str) -> Path:
    """`find_source`, of a policy that has weights.

    Raises:
        CheckpointError: If it has none.
    """
    folder = find_source(source)
    if folder is None:
        raise CheckpointError(
            f"'{source}' is a family with random weights; give the checkpoint folder of a trained policy"
        )
    return folder


def source_type(source: str) -> str:
    """LeRobot's type of the dense policy that `--policy` names, or of the one inside a grids checkpoint.

    Raises:
        UnsupportedPolicyError: If there is none, or it is not supported.
        CheckpointError: If it cannot be read or fetched.
    """
    folder = find_source(source)
    if folder is None:
        return next(kind for kind, family in families().items() if source in family.sources)
    kind: str = base_config(read_config(folder)).type
    get_family(kind)
    return kind


def checked_device(device: str) -> str:
    """The device, if it exists here.

    Raises:
        GridsError: If torch knows no such device, or does not see it.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GridsError(f"device '{device}' is not available here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def short_name(policy: str, *settings: str | int | None) -> str:
    """What to call the results of a checkpoint that is run with some settings."""
    path = Path(policy)
    name = path.parent.name if path.name == CHECKPOINT_FOLDER else path.name
    return "-".join([name, *(str(setting) for setting in settings if setting is not None)])


def token_counts(policy: Any) -> tuple[int | None, int | None]:
    """Visual tokens per camera of a policy: (those it uses, those of its dense policy); None where unknown."""
    if isinstance(policy, GridsPolicy):
        return policy.num_tokens, policy.seam.layout.num_dense_tokens
    try:
        dense = get_family(policy.config.type).layout(policy).num_dense_tokens
    except UnsupportedPolicyError:  # a policy without a token grid can still be evaluated
        return None, None
    return dense, dense


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


def _describe_robot(config: Any, meta: LeRobotDatasetMetadata) -> None:
    """Put into a dense policy's configuration what LeRobot's `make_policy` takes from the dataset.

    Else a checkpoint keeps the action names of the robot that it was trained on before, and a command that goes by them
    sends each joint another joint's value.
    """
    names = meta.features[ACTION].get("names")
    if isinstance(names, dict):  # older datasets group them: {"motors": [...]}
        names = [name for group in names.values() for name in group]
    if names is not None and hasattr(config, "action_feature_names"):
        config.action_feature_names = list(names)
    describe = getattr(config, "set_dataset_feature_metadata", None)
    if callable(describe):
        describe(meta.features)


def _check_sizes(source: str, config: Any) -> None:
    base = base_config(config)
    for feature, field in ((config.robot_state_feature, "max_state_dim"), (config.action_feature, "max_action_dim")):
        limit = getattr(base, field, None)
        if feature is not None and limit is not None and feature.shape[0] > limit:
            kind, size = feature.type.value.lower(), feature.shape[0]
            raise DatasetError(
                f"the dataset's {kind} has {size} dimensions, and {source} takes at most {limit} ({field}); "
                "choose another policy, or a dataset with fewer"
            )
