"""The type of `GridsConfig.base`: any registered policy except ours.

draccus registers every choice of a choice field before parsing, so a field of type `PreTrainedConfig` inside
a `PreTrainedConfig` recurses for ever and hangs every LeRobot command, even `--policy.type=act`.
"""

from dataclasses import dataclass
from typing import Any

import draccus
import lerobot.policies  # noqa: F401  (registers the built-in policy types)
from lerobot.configs import PreTrainedConfig

# The one type a base policy cannot be.
GRIDS_TYPE = "grids"


# draccus looks inside a choice type only if it is a dataclass.
@dataclass
class BasePolicyChoice(draccus.ChoiceRegistry):
    """`PreTrainedConfig`'s choices, seen through a proxy that leaves out "grids"."""

    @classmethod
    def get_known_choices(cls) -> dict[str, Any]:
        return {name: choice for name, choice in PreTrainedConfig.get_known_choices().items() if name != GRIDS_TYPE}

    @classmethod
    def get_choice_class(cls, name: str) -> Any:
        return cls.get_known_choices()[name]

    @classmethod
    def get_choice_name(cls, subcls: Any) -> str:
        if subcls is cls:
            raise ValueError(f"{cls.__name__} is a proxy and no choice itself")
        return str(PreTrainedConfig.get_choice_name(subcls))


# Without this draccus drops the "type" key when it encodes a base config, and the file cannot be read back.
BasePolicyChoice.register(PreTrainedConfig)
