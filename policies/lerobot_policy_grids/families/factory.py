"""What LeRobot's factory does for one type of policy only, for a grids policy around such a policy, too.

Where it loads processors from a checkpoint it asks for the class of the configuration: EVO1's pipelines get back their
converter and widths, GR00T's are linked again. A wrapper's configuration has another class, and answers for its base
everything else that these functions ask.
"""

from typing import Any

from lerobot.configs import PreTrainedConfig


class _OrAround:
    """In the place of a class of configurations: `isinstance` with it is true for a wrapper's configuration, too."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __instancecheck__(self, config: Any) -> bool:
        return isinstance(config, self.kind) or isinstance(vars(config).get("base"), self.kind)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.kind(*args, **kwargs)


def recognise_wrapped(policy_type: str) -> None:
    """From now on LeRobot's factory recognises a type of policy in its wrapper. Nothing changes for dense policies."""
    from lerobot.policies import factory

    kind = PreTrainedConfig.get_choice_class(policy_type)
    name = kind.__name__ if isinstance(kind, type) else ""
    if vars(factory).get(name) is kind:
        setattr(factory, name, _OrAround(kind))
