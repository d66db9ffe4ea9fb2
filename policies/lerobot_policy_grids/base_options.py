"""Options of the base policies as options of the wrapper, by rule and not by list.

LeRobot's commands take `--policy.n_action_steps=1` and the like for every policy. The wrapper's configuration has each
such option of the supported families as a field of its own; a value that is given goes to the base policy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from functools import cache, reduce
from operator import or_
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lerobot.configs import PreTrainedConfig

from .errors import GridsError
from .families import families

SIMPLE = (int, float, bool, str)


@cache
def base_options() -> dict[str, Any]:
    """Name -> type of every simple option of the supported base policies that is no option of all LeRobot policies."""
    common = {f.name for f in fields(PreTrainedConfig)}
    types: dict[str, set[Any]] = {}
    for policy_type in families():
        kind = PreTrainedConfig.get_choice_class(policy_type)
        hints = _hints(kind)
        for f in fields(kind):
            if f.init and f.name not in common and _is_simple(hints.get(f.name)):
                types.setdefault(f.name, set()).add(_of_a_value(hints[f.name]))
    return {name: kinds.pop() for name, kinds in sorted(types.items()) if len(kinds) == 1}


def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # a name that is imported for type checkers alone
        return {f.name: f.type for f in fields(kind)}


def _of_a_value(kind: Any) -> Any:
    """A type without None, which says that a policy needs no value and which another policy may not allow."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    return reduce(or_, [part for part in get_args(kind) if part is not NoneType])


def _is_simple(kind: Any) -> bool:
    """Numbers, texts, and lists, tuples and alternatives of them."""
    return kind in (*SIMPLE, type(None), Ellipsis) or (bool(get_args(kind)) and all(map(_is_simple, get_args(kind))))


def add_base_options(wrapper: type) -> type:
    """Class decorator below `@dataclass`: give a configuration each of `base_options`, None where it is not given."""
    own = wrapper.__annotations__
    for name, kind in base_options().items():
        if name not in own and not hasattr(wrapper, name):
            own[name] = kind | None
            setattr(wrapper, name, field(default_factory=_nothing, repr=False, compare=False, metadata=_help(name)))
    return wrapper


class _Fields:
    """`__dataclass_fields__` of a class that has more fields than its instances."""

    def __init__(self, declared: dict[str, Any], hidden: frozenset[str]) -> None:
        self.declared = declared
        self.own = {name: f for name, f in declared.items() if name not in hidden}

    def __get__(self, instance: Any, owner: type) -> dict[str, Any]:
        return self.declared if instance is None else self.own


def hide_from_instances(wrapper: type, names: frozenset[str]) -> None:
    """Let a command line see these fields of a dataclass, but not what saves, copies or prints an instance."""
    wrapper.__dataclass_fields__ = _Fields(wrapper.__dataclass_fields__, names)  # type: ignore[attr-defined]


def _nothing() -> None:
    return None


def _help(name: str) -> dict[str, str]:
    return {"help": f"The base policy's {name}."}


def hand_to_base(base: Any, given: dict[str, Any]) -> None:
    """Set options of a base policy's configuration, and let it check them.

    Raises:
        GridsError: If it has no such option, or refuses the value.
    """
    _refuse_unknown(base.type, base, given)
    if given:
        vars(base).update(given)
        with _checking(base.type, given):
            base.__post_init__()


def new_base(policy_type: str, given: dict[str, Any], **others: Any) -> Any:
    """A base policy's configuration that has these options from the start, and `others`, which are not the user's.

    Raises:
        GridsError: If it has no such option, or refuses the value.
    """
    kind = PreTrainedConfig.get_choice_class(policy_type)
    _refuse_unknown(policy_type, SimpleNamespace(**{f.name: None for f in fields(kind) if f.init}), given)
    with _checking(policy_type, given):
        return kind(**others, **given)


def _refuse_unknown(policy_type: str, base: Any, given: dict[str, Any]) -> None:
    unknown = [name for name in given if not hasattr(base, name)]
    if unknown:
        raise GridsError(f"the '{policy_type}' policy has no option {', '.join(unknown)}; drop it")


@contextmanager
def _checking(policy_type: str, given: dict[str, Any]) -> Iterator[None]:
    """Around what lets a configuration check its options."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        if not given:
            raise
        raise GridsError(f"the '{policy_type}' policy cannot have {given}: {error}") from error


def take_defaults_from(base: Any, trained: Any) -> None:
    """Give a base policy's configuration what its weights were trained with, where it still has LeRobot's default.

    Args:
        base: The configuration; what differs from the default was asked for and stays.
        trained: The configuration that was saved with the weights.

    Raises:
        GridsError: If the weights are another policy's.
    """
    if trained.type != base.type:
        raise GridsError(
            f"base.pretrained_path has policy type '{trained.type}', expected '{base.type}'; give its type"
        )
    common = {f.name for f in fields(PreTrainedConfig)}
    taken = {}
    for f in fields(base):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.init and f.name not in common and getattr(base, f.name) == default:
            taken[f.name] = getattr(trained, f.name)
    hand_to_base(base, taken)
