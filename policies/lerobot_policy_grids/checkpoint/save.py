"""Writing a policy's configuration and weights, the same with every LeRobot release."""

from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor


def save_policy(policy: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write config.json and model.safetensors of a policy, dense or grids.

    LeRobot's own `save_pretrained` takes a state that is not the policy's in some releases, and ignores it in others.

    Args:
        policy: The policy.
        folder: Where to; it must exist.
        state: The policy's state, where it is not what `policy.state_dict()` gives.
    """
    if state is None:
        policy.save_pretrained(folder)
        return
    policy.config.save_pretrained(folder)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    # One file, whatever its size.
    save_torch_state_dict(state, str(folder), max_shard_size=max(size, 1))
