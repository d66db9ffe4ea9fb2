"""Families: everything this project knows of a VLA family is in one file here, and nowhere else.

A module of this package that holds `FAMILIES` declares those LeRobot policy types; being there registers them.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

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


__all__ = ["REFUSED", "DensePolicy", "Family", "Recipe", "Seam", "Stages", "Target", "families", "get_family"]
