"""Families: everything this project knows of a VLA family is in one file here, and nowhere else.

A module of this package that holds `FAMILIES` declares those LeRobot policy types; being there registers them. A family
with a fast path has a second file, in `phases`.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ..errors import UnsupportedPolicyError
from .base import DensePolicy, Family, Recipe, Stages, Target
from .refused import REFUSED
from .seam import Seam


@cache
def families() -> dict[str, Family]:
    """Every family, by LeRobot's policy type."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return {family.policy_type: family for module in modules for family in getattr(module, "FAMILIES", ())}


def get_family(policy_type: str) -> Family:
    """The family of a LeRobot policy type.

    Raises:
        UnsupportedPolicyError: If this project has none for it.
    """
    known = families()
    if policy_type not in known:
        why = f": {REFUSED[policy_type].reason}" if policy_type in REFUSED else ""
        raise UnsupportedPolicyError(
            f"policy type '{policy_type}' is not supported{why}; choose one of {', '.join(sorted(known))}. "
            "CONTRIBUTING.md says how to add a family"
        )
    return known[policy_type]


def acting_batch(policy_type: str, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch that was prepared for training as a policy of any type acts on it."""
    family = families().get(policy_type)
    return batch if family is None else family.acting(batch)


__all__ = [
    "REFUSED",
    "DensePolicy",
    "Family",
    "Recipe",
    "Seam",
    "Stages",
    "Target",
    "acting_batch",
    "families",
    "get_family",
]
