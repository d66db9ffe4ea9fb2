"""Remove or shuffle one input of a policy during evaluation, to test whether the policy uses that input.

A tampering differs from a perturbation: it removes an input, works in any environment and for any policy, and has no
severity. A policy that succeeds as often without an input does not use it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lerobot.utils.constants import OBS_IMAGE, OBS_STATE
from torch import Tensor

from lerobot_policy_grids.errors import SimulationError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.modeling_grids import dense_policy

from ..choices import parts, tampering_fault

Observation = dict[str, Any]

PATCHES = 8


def parse_tamperings(text: str | None) -> list[str]:
    """Names in a comma-separated list; an empty text gives none.

    Raises:
        SimulationError: If a name is unknown.
    """
    fault = tampering_fault(text)
    if fault is not None:
        raise SimulationError(fault)
    return list(dict.fromkeys(parts(text)))


def other_instructions(instructions: list[str]) -> list[str]:
    """For each task of an evaluation, the next different instruction in the list; the last gets the first.

    Raises:
        SimulationError: If all tasks have the same instruction.
    """
    different = list(dict.fromkeys(instructions))
    if len(different) < 2:
        raise SimulationError(
            f"tampering 'instruction' needs another task's instruction, but every task here says '{different[0]}'; "
            "evaluate tasks that differ, such as --tasks push-v3,coffee-push-v3"
        )
    following = dict(zip(different, [*different[1:], different[0]], strict=True))
    return [following[instruction] for instruction in instructions]


@contextmanager
def tamper(
    names: list[str], policy: Any, preprocessor: Any, instruction: str, seed: int
) -> Iterator[Callable[[Observation], Observation]]:
    """Tamper with a policy's input while the block runs.

    Args:
        names: Names from `choices.TAMPERINGS`.
        policy: The policy, dense or grids.
        preprocessor: The policy's pre-processor, which holds the mean state.
        instruction: Text that replaces the task's instruction.
        seed: Seed of the shuffling.

    Yields:
        A function that changes an observation with LeRobot's names, before the policy's pre-processor.

    Raises:
        UnsupportedPolicyError: If `names` has "tokens" and the policy has no token grid.
    """
    random = torch.Generator().manual_seed(seed)

    def spoil(observation: Observation) -> Observation:
        spoiled = dict(observation)
        for key, value in observation.items():
            if key.startswith(OBS_IMAGE):
                if "image" in names:
                    spoiled[key] = torch.zeros_like(value)
                elif "patches" in names:
                    spoiled[key] = shuffle_patches(value, random)
            elif key == OBS_STATE and "state" in names:
                spoiled[key] = mean_state(preprocessor).to(value).expand_as(value)
            elif key == "task" and "instruction" in names:
                spoiled[key] = [instruction] * len(value)
        return spoiled

    with ExitStack() as stack:
        if "tokens" in names:
            stack.enter_context(_shuffled_tokens(policy, random))
        yield spoil


def shuffle_patches(images: Tensor, random: torch.Generator) -> Tensor:
    """Shuffle the 8 x 8 patches of images [b, c, h, w]. Remaining rows and columns at the end stay in place."""
    height, width = (size // PATCHES for size in images.shape[-2:])
    whole = images[..., : height * PATCHES, : width * PATCHES]
    tiles = whole.unflatten(-1, (PATCHES, width)).unflatten(-3, (PATCHES, height))
    # [b, c, row, y, column, x] -> [b, c, row and column, y, x]
    tiles = tiles.transpose(-3, -2).flatten(-4, -3)
    tiles = tiles[..., torch.randperm(PATCHES**2, generator=random), :, :]
    shuffled = images.clone()
    shuffled[..., : height * PATCHES, : width * PATCHES] = (
        tiles.unflatten(-3, (PATCHES, PATCHES)).transpose(-3, -2).flatten(-2, -1).flatten(-3, -2)
    )
    return shuffled


def mean_state(preprocessor: Any) -> Tensor:
    """Mean robot state [d] of the training data, from the policy's normalisation.

    Raises:
        SimulationError: If the pre-processor has no mean state.
    """
    for step in preprocessor.steps:
        statistics = (getattr(step, "stats", None) or {}).get(OBS_STATE, {})
        if "mean" in statistics:
            return torch.as_tensor(statistics["mean"], dtype=torch.float32)
    raise SimulationError("tampering 'state' needs the mean state, and the policy's pre-processor holds none")


@contextmanager
def _shuffled_tokens(policy: Any, random: torch.Generator) -> Iterator[None]:
    base = dense_policy(policy)
    family = get_family(base.config.type)

    def shuffle(tokens: Tensor) -> Tensor:
        return tokens[:, torch.randperm(tokens.shape[1], generator=random).to(tokens.device)]

    handle = family.feature_source(base).register_forward_hook(
        lambda module, inputs, features: family.change_features(base, features, shuffle)
    )
    try:
        yield
    finally:
        handle.remove()
