"""Load a trained policy, ready to act."""

from pathlib import Path
from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors

from lerobot_policy_grids import GridsConfig, compress
from lerobot_policy_grids.checkpoint import build, check_processors, is_published, load_checkpoint, read_config
from lerobot_policy_grids.checkpoint.files import PREPROCESSOR_FILE, TOKENIZER_FOLDER, read_json
from lerobot_policy_grids.checkpoint.find import require_complete
from lerobot_policy_grids.checkpoint.statistics import check_statistics
from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import CheckpointError, GridsError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.reducers import ReducerConfig

from .loaded import LoadedPolicy, set_flow_steps
from .sources import checked_device, find_weights


def load(
    source: str | Path,
    device: str | None = None,
    num_tokens: int | None = None,
    *,
    rename_map: dict[str, str] | None = None,
    n_action_steps: int | None = None,
    num_steps: int | None = None,
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
        num_steps: Integration steps of the flow for one action chunk; None keeps the checkpoint's.
        reducer: Reduce the tokens of a dense checkpoint so, without training.
        resolution: Side in pixels at which a dense checkpoint sees its images, without training.
        verify: Hash every file that a manifest names, also those that have not changed since they were hashed last.

    Raises:
        CheckpointError: If the checkpoint is incomplete or does not fit.
        GridsError: If the policy's chunks are shorter than `n_action_steps`, or it has none, or no flow.
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
    policy = build_at(str(source), config, resolution)
    load_checkpoint(policy, folder, verify=verify)
    if reducer is not None:
        policy = compress(policy, num_tokens, reducer)
    elif num_tokens is not None:
        policy.num_tokens = num_tokens
    if n_action_steps is not None:
        _set_action_steps(policy, n_action_steps)
    if num_steps is not None:
        set_flow_steps(policy, num_steps)
    policy.to(config.device)
    policy.eval()
    name = policy.config.reducer.type if reducer is not None else ""
    return LoadedPolicy(policy, *load_processors(folder, config, rename_map), name, resolution)


def peek(source: str, rename_map: dict[str, str] | None = None) -> tuple[Any, dict[str, str]]:
    """What a trained policy looks at, without its weights: (configuration, names of observations to the policy's).

    Args:
        source: Checkpoint folder, output folder of a run, or Hub id.
        rename_map: Names to use instead of the checkpoint's.

    Raises:
        CheckpointError: If it is no checkpoint of a trained policy.
    """
    folder = find_weights(source, weights=False)
    require_complete(folder, weights=False)
    renames = rename_map
    if renames is None:
        steps = read_json(folder / PREPROCESSOR_FILE).get("steps", [])
        maps = [step["config"].get("rename_map", {}) for step in steps if isinstance(step.get("config"), dict)]
        renames = {old: new for names in maps for old, new in names.items()}
    return read_config(folder), renames


def build_at(source: str, config: PreTrainedConfig, resolution: int | None, *, fresh: bool = False) -> Any:
    """`build`, at a smaller image size if one is given.

    Args:
        source: What the user calls the policy.
        config: Its configuration.
        resolution: Side in pixels of the square that images are brought to; None keeps the policy's own.
        fresh: Whether no checkpoint follows, so that what is built keeps the weights that LeRobot starts with.
    """
    if resolution is None:
        return build(config, fresh=fresh)
    if isinstance(config, GridsConfig):
        raise GridsError(f"{source} is a grids checkpoint, made for its own image size; drop --resolution")
    if resolution < 1:
        raise GridsError(f"--resolution {resolution}; give the side of a square in pixels")
    family = get_family(config.type)
    family.set_resolution(config, resolution)
    policy = build(config, fresh=fresh)
    # Before a forward pass fails on an image that gives no whole grid.
    family.layout(policy)
    return policy


def _set_action_steps(policy: Any, steps: int) -> None:
    config = base_config(policy.config)
    longest = getattr(config, "chunk_size", None)
    if longest is None or not hasattr(config, "n_action_steps"):
        raise GridsError(f"the '{config.type}' policy does not act in chunks; drop --n_action_steps")
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
        # Of some types of policies LeRobot restores what a file cannot hold.
        pre, post = make_pre_post_processors(
            base_config(config), pretrained_path=str(folder), preprocessor_overrides=overrides
        )
    except Exception as error:  # LeRobot raises whatever its steps meet
        raise CheckpointError(
            f"the processors in {folder} cannot be built: {error}; copy the checkpoint again"
        ) from error
    return pre, post
