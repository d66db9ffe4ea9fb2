"""What a wrapper takes over from its base policy, by rule and not by list: LeRobot adds to it with each release.

- A public method of LeRobot's `PreTrainedPolicy` that the wrapper does not define itself is the base policy's.
- Plain data that a policy's class declares, such as the layers that sharded training wraps, is the base's class's.
- Loading, saving and pushing stay the wrapper's own: they are about its checkpoint.
"""

from collections.abc import Callable
from inspect import isfunction
from typing import Any

from lerobot.policies.pretrained import PreTrainedPolicy

# About the wrapper's checkpoint, or its parameters.
OWN = frozenset(
    {"save_pretrained", "push_model_to_hub", "generate_model_card", "wrap_with_peft", "config_class", "name"}
)


def forward_methods(wrapper: type) -> type:
    """Class decorator: pass to the base, `self.require_attached()`, what `wrapper` does not define itself."""
    for name, member in vars(PreTrainedPolicy).items():
        if isfunction(member) and not name.startswith("_") and name not in OWN and name not in vars(wrapper):
            setattr(wrapper, name, _forwarded(name))
    return wrapper


def declare_as(wrapper: type, base: type) -> None:
    """Let the class `wrapper` declare what the class `base` does. LeRobot reads such data off the class."""
    for name, member in vars(PreTrainedPolicy).items():
        is_data = not callable(member) and not hasattr(member, "__get__")
        if is_data and not name.startswith(("__", "_abc")) and name not in OWN:
            setattr(wrapper, name, getattr(base, name))


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.require_attached(), name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"The base policy's `{name}`."
    return method
