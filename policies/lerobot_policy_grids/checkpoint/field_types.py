"""Whether a JSON value has exactly the type of a configuration field; draccus reads the text "32" as a number."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

# Type of a field -> the types of its JSON values.
PLAIN: dict[Any, tuple[type, ...]] = {
    int: (int,),
    float: (int, float),
    bool: (bool,),
    str: (str,),
    Path: (str,),
    NoneType: (NoneType,),
}


def types_of(kind: type) -> dict[str, Any]:
    """Name -> type of every field of a dataclass."""
    try:
        hints = get_type_hints(kind)
    except NameError:  # a name that is imported for type checkers alone
        hints = {}
    # LeRobot declares an int of ACT whose default is False.
    switches = {field.name for field in fields(kind) if type(field.default) is bool}
    return {
        field.name: int | bool
        if field.name in switches and hints.get(field.name) is int
        else hints.get(field.name, Any)
        for field in fields(kind)
    }


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the type `kind`. A type that is not known here is left to draccus."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in PLAIN:
        return type(value) in PLAIN[kind]
    if origin in (Union, UnionType):
        return any(fits(value, choice) for choice in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(fits(item, arguments[1]) for item in value.values())
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and _fits_tuple(value, arguments)
    if isinstance(kind, type) and is_dataclass(kind):
        types = types_of(kind)
        return isinstance(value, dict) and all(fits(value[name], types[name]) for name in value.keys() & types)
    return True


def _fits_tuple(value: list[Any], kinds: tuple[Any, ...]) -> bool:
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    return len(value) == len(kinds) and all(map(fits, value, kinds))
