"""GridS for LeRobot: run any supported Vision-Language-Action policy on K sampled visual tokens per camera.

    import lerobot_policy_grids as grids

    policy = grids.compress(policy, num_tokens=16)  # any supported LeRobot policy in memory; detach() gives it back

Importing this registers the policy types "grids" and "tiny_smolvla", and the tokenizer step of the latter's
processor. LeRobot imports it by itself, because this distribution's name starts with `lerobot_policy_`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .configuration_grids import GridsConfig
from .reducers import ReducerConfig
from .tiny import TinySmolVLAConfig

if TYPE_CHECKING:
    from .modeling_grids import GridsPolicy, compress
    from .reducers.grid_sampler import GridSampler

_LAZY = {
    "GridSampler": ".reducers.grid_sampler",
    "GridsPolicy": ".modeling_grids",
    "compress": ".modeling_grids",
}

__all__ = ["GridSampler", "GridsConfig", "GridsPolicy", "ReducerConfig", "TinySmolVLAConfig", "compress"]


def __getattr__(name: str) -> Any:
    # The models pull in transformers; a command that only parses flags should not wait for that.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
