"""Build policies at their real dimensions with random weights, without network access.

On the "meta" device they need no memory and compute no values, which is enough to count FLOPs.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.utils.constants import (
    ACTION,
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lerobot_policy_grids.checkpoint import build
from lerobot_policy_grids.errors import UnsupportedPolicyError
from lerobot_policy_grids.families import Family, families, get_family

STATE_SIZE = ACTION_SIZE = 14


def architectures() -> dict[str, Family]:
    """Families whose default architecture can be built here, by name."""
    return {
        name: family
        for family in families().values()
        for name, place in family.sources.items()
        if place is None or isinstance(place, str)
    }


def make_config(name: str, cameras: int, size: int | None = None, dtype: str = "bfloat16") -> PreTrainedConfig:
    """The configuration of a family's default architecture.

    Args:
        name: A name in `architectures`.
        cameras: Number of cameras.
        size: Side of the square image in pixels; None takes the family's default.
        dtype: "bfloat16" or "float32", for families that support both.

    Raises:
        UnsupportedPolicyError: If the name is unknown, or packages that it needs are not installed.
    """
    known = architectures()
    if name not in known:
        raise UnsupportedPolicyError(f"'{name}' is not a known architecture; choose from {', '.join(known)}")
    size = known[name].image_size if size is None else size
    inputs = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, size, size)) for i in range(cameras)}
    inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (STATE_SIZE,))
    outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (ACTION_SIZE,))}
    with known[name].needing_its_extra():
        return known[name].config(inputs, outputs, size, dtype)


def instantiate(config: PreTrainedConfig, device: str) -> Any:
    """Build the policy with random weights in evaluation mode, on a device or on "meta".

    Weights are created in the policy's own precision, because in float32 a large model would need twice the memory.

    Raises:
        UnsupportedPolicyError: If packages that it needs are not installed.
    """
    config.device = device
    family = get_family(config.type)
    # Some of LeRobot's policies print while they are constructed.
    with (
        family.needing_its_extra(),
        family.offline(config),
        torch.device(device),
        cheap_construction(config),
        redirect_stdout(StringIO()),
    ):
        policy = build(config).eval()
    family.finish(policy)
    if device != "meta":
        _fill(policy)
    # Constants that a policy makes by numpy, such as ACT's positions, are on the CPU.
    return policy.to(device)


def precision(policy: nn.Module) -> str:
    """Precision of most of a policy's weights, such as "bfloat16"; options of families have many names for it."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in policy.parameters():
        sizes[parameter.dtype] += parameter.numel()
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


def make_batch(policy: Any, language_tokens: int, device: str) -> dict[str, Tensor]:
    """Make one random observation in the format of the policy's pre-processor."""
    config = policy.config
    batch: dict[str, Tensor] = {
        key: torch.rand(1, *feature.shape, device=device) for key, feature in config.image_features.items()
    }
    batch[OBS_STATE] = torch.randn(1, STATE_SIZE, device=device)
    batch[OBS_LANGUAGE_TOKENS] = torch.full((1, language_tokens), 7, device=device)
    batch[OBS_LANGUAGE_ATTENTION_MASK] = torch.ones(1, language_tokens, dtype=torch.bool, device=device)
    return get_family(config.type).complete(policy, batch)


def make_training_batch(policy: Any, size: int, language_tokens: int, device: str) -> dict[str, Tensor]:
    """Make a random batch of `size` frames for the policy's `forward`: as many cameras, joints and steps as it has."""
    config = policy.config
    batch: dict[str, Tensor] = {
        key: torch.rand(size, *feature.shape, device=device) for key, feature in config.image_features.items()
    }
    if config.robot_state_feature is not None:
        batch[OBS_STATE] = torch.randn(size, *config.robot_state_feature.shape, device=device)
    batch[OBS_LANGUAGE_TOKENS] = torch.full((size, language_tokens), 7, device=device)
    batch[OBS_LANGUAGE_ATTENTION_MASK] = torch.ones(size, language_tokens, dtype=torch.bool, device=device)
    batch[ACTION] = torch.randn(size, config.chunk_size, *config.action_feature.shape, device=device)
    batch["action_is_pad"] = torch.zeros(size, config.chunk_size, dtype=torch.bool, device=device)
    # Of policies that write actions as tokens; others do not read them.
    count = getattr(config, "max_action_tokens", 1)
    batch[ACTION_TOKENS] = torch.full((size, count), 7, device=device)
    batch[ACTION_TOKEN_MASK] = torch.ones(size, count, dtype=torch.bool, device=device)
    return get_family(config.type).complete(policy, batch)


class _NoRandomFill(TorchDispatchMode):
    """Skip the slow random initialisation of weights; `_fill` sets them afterwards."""

    SKIPPED = frozenset({"normal_", "uniform_", "erfinv_", "random_"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.SKIPPED:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def cheap_construction(config: Any) -> Iterator[None]:
    """In this block a policy is made in the precision that it has, and its weights keep undefined values.

    Where the option has another name than `dtype`, LeRobot's class makes its weights in that precision itself.
    """
    saved = torch.get_default_dtype()
    if getattr(config, "dtype", "float32") == "bfloat16":
        torch.set_default_dtype(torch.bfloat16)
    try:
        with _NoRandomFill():
            yield
    finally:
        torch.set_default_dtype(saved)


def _fill(policy: nn.Module, block: int = 1 << 20) -> None:
    """Fill every parameter by repeating one block of small random values: fast, and without denormals."""
    values = torch.randn(block) * 0.02
    with torch.no_grad():
        for parameter in policy.parameters():
            flat = parameter.view(-1)
            source = values.to(flat.device, flat.dtype)
            for start in range(0, len(flat), block):
                part = flat[start : start + block]
                part.copy_(source[: len(part)])
