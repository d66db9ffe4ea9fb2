"""Build the policy that is to be trained."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from lerobot.configs import PreTrainedConfig
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.processor import RenameObservationsProcessorStep, rename_stats
from lerobot.utils.constants import ACTION, IMAGENET_STATS

from lerobot_policy_grids import GridsConfig, GridsPolicy
from lerobot_policy_grids.base_options import new_base
from lerobot_policy_grids.checkpoint import load_checkpoint, provenance, read_config
from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import BudgetError, GridsError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.processor_grids import make_processors
from lerobot_policy_grids.reducers import ReducerConfig, reducer_config

from ..preflight import Finding, refuse_errors
from ..preflight.episodes import check_episodes
from ..preflight.features import DatasetFeatures, read_features
from ..preflight.language import check_tasks
from ..preflight.normalisation import check_normalisation
from ..preflight.relative import check_relative
from ..preflight.robot import check_training
from .loaded import LoadedPolicy
from .loading import build_at
from .sources import Tokens, find_source, find_weights, named_type


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
    base: dict[str, Any] | None = None,
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
        base: Options of a policy that starts without a checkpoint, by LeRobot's names.

    Raises:
        GridsError: If the policy, the budget and the dataset do not fit; the message says how.
    """
    data = read_features(meta, rename_map)
    asked = _asked_reducer(reducer)
    # Without its weights: what does not fit is said before gigabytes are fetched.
    folder = find_source(source, weights=False)
    config, findings = configure(source, folder, data, base or {})
    findings += check_relative(source, config, meta, data)
    refuse_errors(findings)
    config.validate_features()
    if gradient_checkpointing:
        if not hasattr(base_config(config), "gradient_checkpointing"):
            raise GridsError(f"LeRobot's '{base_config(config).type}' has no gradient checkpointing; drop that option")
        config.gradient_checkpointing = True
    statistics = _with_imagenet(rename_stats(meta.stats, rename_map or {}), data)
    preprocessor, postprocessor = make_processors(config, statistics, meta)
    refuse_errors(check_normalisation(preprocessor, postprocessor))
    findings += check_episodes(config, meta)
    findings += check_tasks(preprocessor, list(meta.tasks.index), statistics)
    refuse_errors(findings)
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            step.rename_map = rename_map or {}

    policy = build_at(source, config, resolution, fresh=folder is None)
    if folder is None:
        # Its checkpoint will hold what it started with.
        get_family(config.type).without_download(policy.config)
    if isinstance(policy, GridsPolicy):
        load_checkpoint(policy, find_weights(source))
        _continue(source, policy, tokens, asked, schedule, position_ids)
    else:
        dense = policy
        if tokens == "dense":
            _refuse_useless(reducer, schedule, position_ids)
        else:
            policy = _wrap(policy, folder, tokens, asked, schedule, position_ids)
        if folder is not None:
            load_checkpoint(dense, find_weights(source))
    return LoadedPolicy(policy, preprocessor, postprocessor, findings=[f for f in findings if not f.is_error])


def _with_imagenet(statistics: dict[str, Any], data: DatasetFeatures) -> dict[str, Any]:
    """Statistics whose cameras have ImageNet's mean and deviation, as lerobot-train gives them to every policy.

    Only policies that normalise images by the dataset's statistics read them.
    """
    imagenet = {name: np.array(value, dtype=np.float32) for name, value in IMAGENET_STATS.items()}
    return statistics | {name: statistics.get(name, {}) | imagenet for name in data.cameras}


def configure(
    source: str, folder: Path | None, data: DatasetFeatures, base: dict[str, Any] | None = None
) -> tuple[Any, list[Finding]]:
    """The configuration of the policy to start from, with the dataset's features, and what does not fit.

    Args:
        source: What the user calls the policy.
        folder: Its checkpoint; None takes the default configuration of the family of that name.
        data: The dataset's features.
        base: Options of a policy that has no checkpoint.
    """
    if base and folder is not None:
        raise GridsError(
            f"--base sets {', '.join(base)}, but {source} is a checkpoint with options of its own; drop it, or start "
            "from a family that has no checkpoint"
        )
    if folder is None:
        config: Any = _new_config(named_type(source), data, base or {})
    else:
        config = read_config(folder)
        get_family(base_config(config).type)
    findings = check_training(source, config, data)
    # The checkpoint's cameras at the size that they have in this dataset.
    config.input_features = {key: data.inputs.get(key, old) for key, old in config.input_features.items()}
    config.output_features = data.outputs
    config.device = "cpu"
    # A local folder, which another machine does not have.
    config.pretrained_path = None
    if isinstance(config, GridsConfig):
        config.share_with_base()
    _describe_robot(base_config(config), data)
    return config, findings


def _new_config(policy_type: str, data: DatasetFeatures, options: dict[str, Any]) -> Any:
    """The default configuration of a family with these options. Some read files of the model that they begin with."""
    family, kind = get_family(policy_type), PreTrainedConfig.get_choice_class(policy_type)
    asked = SimpleNamespace(**{name: options.get(name, getattr(kind, name, None)) for name in family.repositories})
    with family.needing_its_extra(), family.needing_its_files(asked, fresh=True):
        return new_base(policy_type, options, input_features=data.inputs, device="cpu")


def _refuse_useless(reducer: Any, schedule: str, position_ids: str | None) -> None:
    given = {"reducer": reducer, "schedule": None if schedule == "constant" else schedule, "position_ids": position_ids}
    useless = [f"{name}={value}" for name, value in given.items() if value is not None]
    if useless:
        raise GridsError(
            f"--tokens dense keeps every token, so {', '.join(useless)} would have nothing to do; drop one"
        )


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
    if schedule != "constant" and options["type"] != "blind":
        dense_tokens = get_family(policy.config.type).layout(policy).num_dense_tokens
        options.setdefault("num_tokens_max", dense_tokens)
    reducer = reducer_config(options.pop("type"), **options)
    if reducer.in_trunk:
        get_family(policy.config.type).require_trunk_training()
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


def _describe_robot(config: Any, data: DatasetFeatures) -> None:
    """Put into a dense policy's configuration what LeRobot's `make_policy` takes from the dataset.

    Else a checkpoint keeps the action names of the robot that it was trained on before, and a command that goes by them
    sends each joint another joint's value.
    """
    if hasattr(config, "action_feature_names"):
        config.action_feature_names = data.names.get(ACTION)
    describe = getattr(config, "set_dataset_feature_metadata", None)
    if callable(describe):
        describe(data.described)
