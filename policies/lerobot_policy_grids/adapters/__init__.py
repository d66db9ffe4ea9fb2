"""Adapters: one small file per VLA family, saying where its visual tokens are born."""

from importlib import import_module

from ..errors import UnsupportedPolicyError
from .base import Adapter, Prediction, Stages
from .layout import TokenLayout
from .seam import Seam

# LeRobot policy type -> "module:class" of its adapter; imported on use.
ADAPTERS = {
    "pi0": "pi0:PI0Adapter",
    "pi05": "pi0:PI0Adapter",
    "pi0_fast": "pi0:PI0Adapter",
    "smolvla": "smolvla:SmolVLAAdapter",
    "tiny_smolvla": "smolvla:SmolVLAAdapter",
}


def get_adapter(policy_type: str) -> Adapter:
    """The adapter of a LeRobot policy type.

    Raises:
        UnsupportedPolicyError: If this project has no adapter for it.
    """
    if policy_type not in ADAPTERS:
        raise UnsupportedPolicyError(
            f"policy type '{policy_type}' has no adapter; supported are {', '.join(sorted(ADAPTERS))}. "
            "CONTRIBUTING.md says how to add a family"
        )
    module, name = ADAPTERS[policy_type].split(":")
    adapter: Adapter = getattr(import_module(f".{module}", __name__), name)()
    return adapter


__all__ = ["ADAPTERS", "Adapter", "Prediction", "Seam", "Stages", "TokenLayout", "get_adapter"]
