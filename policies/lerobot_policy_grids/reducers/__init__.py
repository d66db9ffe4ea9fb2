"""Reducers: methods that give the trunk fewer visual tokens. Each file holds a configuration and a module.

A `MapReducer` works between vision tower and trunk, a `TrunkReducer` between two layers of the trunk. This package
imports all its modules, so a new file registers its configuration without further code.
"""

from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules

from ..errors import GridsError
from .base import BlindReducer, MapReducer, Reducer, ReducerConfig, Sampled
from .layout import TokenLayout

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["BlindReducer", "MapReducer", "Reducer", "ReducerConfig", "Sampled", "TokenLayout", "reducer_config"]


def reducer_config(name: str, **options: object) -> ReducerConfig:
    """The configuration of the reducer called `name`, with these options.

    Raises:
        GridsError: If there is no such reducer, or it has no such option.
    """
    known = ReducerConfig.get_known_choices()
    if name not in known:
        raise GridsError(f"reducer '{name}' is unknown; choose one of {', '.join(known)}")
    has = [field.name for field in fields(known[name])]
    unknown = sorted(options.keys() - set(has))
    if unknown:
        raise GridsError(
            f"reducer '{name}' has no option {', '.join(unknown)}; its options are: {', '.join(has) or 'none'}"
        )
    config: ReducerConfig = known[name](**options)
    return config
