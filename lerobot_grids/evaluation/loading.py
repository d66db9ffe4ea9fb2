"""Checkpoints loaded strictly, ready to act."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.factory import make_pre_post_processors

from lerobot_policy_grids.adapters import get_adapter
from lerobot_policy_grids.checkpoint import CHECKPOINT_FOLDER, is_published, read_config, require_complete
from lerobot_policy_grids.errors import CheckpointError, GridsError, UnsupportedPolicyError
from lerobot_policy_grids.modeling_grids import GridsPolicy, build, load_checkpoint
from lerobot_policy_grids.trust import check_processors

from ..policies import find_source, set_resolution, wrap


@dataclass
class LoadedPolicy:
    """A policy ready to act, with its processors, and what was done to it without training."""

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


def load_policy(
    source: str,
    device: str | None = None,
    num_tokens: int | None = None,
    rename_map: dict[str, str] | None = None,
    n_action_steps: int | None = None,
    reducer: str | None = None,
    resolution: int | None = None,
) -> LoadedPolicy:
    """Load a checkpoint strictly, dense or grids, with the processors that were saved beside it.

    Args:
        source: Checkpoint folder, output folder of a run, or Hub id.
        device: Where it runs; None keeps the checkpoint's, or what this machine has.
        num_tokens: Run-time budget of a grids checkpoint, or of `reducer`.
        reducer: Reduce the tokens of a dense checkpoint so, without training.
        resolution: Side in pixels at which a dense checkpoint sees its images, without training.
        rename_map: Names of the environment's observations to the policy's; None keeps the checkpoint's.
        n_action_steps: Steps of each action chunk that are executed before the policy looks again; None keeps the
            checkpoint's.

    Raises:
        CheckpointError: If the checkpoint is incomplete or does not fit.
        GridsError: If the policy's chunks are shorter than `n_action_steps`, or it has none.
    """
    folder = find_source(source)
    if not isinstance(folder, Path):
        raise CheckpointError(
            f"'{source}' is a family with random weights; give the checkpoint folder of a trained policy"
        )
    require_complete(folder)
    config = read_config(folder)
    kind = config.type
    if device is not None:
        config.device = checked_device(device)
    if num_tokens is not None and kind != "grids" and reducer is None:
        raise CheckpointError(
            f"{source} is a dense '{kind}' policy, which has no token budget to set; drop --tokens, or say with "
            "--reducer how its tokens should be reduced without training"
        )
    if reducer is not None and kind == "grids":
        raise CheckpointError(f"{source} was trained with reducer '{config.reducer}'; drop --reducer")
    if resolution is not None:
        set_resolution(source, config, resolution)
    policy = build(config)
    # Before a forward pass fails on an image that gives no whole grid.
    if resolution is not None:
        get_adapter(kind).layout(policy)
    load_checkpoint(policy, folder)
    if reducer is not None:
        policy = wrap(policy, 16 if num_tokens is None else num_tokens, reducer)
    elif num_tokens is not None:
        policy.num_tokens = num_tokens
    if n_action_steps is not None:
        _set_action_steps(policy, n_action_steps)
    policy.to(config.device)
    policy.eval()
    return LoadedPolicy(policy, *load_processors(folder, config, rename_map), reducer or "", resolution)


def _set_action_steps(policy: Any, steps: int) -> None:
    config = policy.base.config if isinstance(policy, GridsPolicy) else policy.config
    longest = getattr(config, "chunk_size", None)
    if longest is None or not hasattr(config, "n_action_steps"):
        raise GridsError(f"a '{config.type}' policy does not act in chunks; drop --n_action_steps")
    if not 1 <= steps <= longest:
        raise GridsError(f"--n_action_steps {steps}; the policy's chunks have {longest} steps, so give 1 .. {longest}")
    config.n_action_steps = steps


def load_processors(folder: Path, config: Any, rename_map: dict[str, str] | None = None) -> tuple[Any, Any]:
    """The (pre-processor, post-processor) that were saved beside a checkpoint.

    Raises:
        CheckpointError: If they cannot be built, or came from the Hub and hold what could run code.
    """
    if is_published(folder):
        check_processors(folder)
    overrides: dict[str, dict[str, Any]] = {"device_processor": {"device": str(config.device)}}
    if rename_map is not None:
        overrides["rename_observations_processor"] = {"rename_map": rename_map}
    try:
        pre, post = make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=overrides)
    except Exception as error:  # LeRobot raises whatever its steps meet
        raise CheckpointError(
            f"the processors in {folder} cannot be built: {error}; copy the checkpoint again"
        ) from error
    return pre, post


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
    try:
        if isinstance(policy, GridsPolicy):
            return policy.num_tokens, policy.adapter.layout(policy.base).num_dense_tokens
        dense = get_adapter(policy.config.type).layout(policy).num_dense_tokens
        return dense, dense
    except UnsupportedPolicyError:  # a policy without a token grid can still be evaluated
        return None, None
