"""The argument parser of all subcommands: parameters of a function become options, and errors fit in one line."""

import re
import sys
from collections.abc import Callable
from difflib import get_close_matches
from inspect import signature
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from .messages import OptionError, one_line

# Use the string under a dataclass field as the help of its option.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class OneLineErrors:
    """Mixin for a jsonargparse parser: an error in the command line prints one line and exits with code 2."""

    prog: str
    _option_string_actions: dict[str, Any]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit."""
        prefix, _, given = message.partition("unrecognized arguments: ")
        if given and not prefix:
            known = [flag for flag in self._option_string_actions if flag.startswith("--")]
            message = unknown_option(given.split()[0].partition("=")[0], known)
        message = in_words(message)
        print(f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


# jsonargparse's words for a value that does not fit, and ours for what would.
_WRONG_VALUE = re.compile(r'Parser key "([\w.]+)":.*(?:Got|Given) value: (.*)', re.DOTALL)
_EXPECTED = re.compile(r"Expected (?:a )?(?:<class '(\w+)'>|typing\.Literal\[([^\]]*)\])")
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list, such as [a, b]",
    "dict": 'names and values, such as \'{"a": "b"}\'',
}


def in_words(message: str) -> str:
    """What jsonargparse says of a value that does not fit, in words; other messages as they are."""
    found = _WRONG_VALUE.match(message)
    expected = _EXPECTED.findall(message)
    kinds = [KINDS.get(kind, choices.replace("'", "")) for kind, choices in expected if kind != "NoneType"]
    if found is None or not kinds or not all(kinds):
        return message
    return f"--{found[1]} {found[2].strip() or repr('')}; give {' or '.join(dict.fromkeys(kinds))}"


def unknown_option(given: str, known: list[str]) -> str:
    """Say that there is no such option, and which is nearest."""
    near = get_close_matches(given, known, 1)
    if not given.startswith("-"):
        return f"'{given}' is not expected here; options begin with --"
    return f"{given} is not an option" + (f"; did you mean {near[0]}?" if near else "")


class Parser(OneLineErrors, ArgumentParser):
    """A subcommand's parser.

    Attributes:
        examples: Command lines that its help shows at the end.
    """

    examples: tuple[str, ...] = ()

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help text."""
        text = str(super().format_help(*args, **kwargs))
        shown = "".join(f"  {line}\n" for line in self.examples)
        return f"{text}\nexamples:\n{shown}" if shown else text


def examples_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The command lines in the docstring of a subcommand's function."""
    _, _, text = (function.__doc__ or "").partition("\n    Examples:\n")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def parse(
    function: Callable[..., Any], command: str, arguments: list[str], *, positional: bool = False
) -> dict[str, Any]:
    """Parse `arguments` into the parameters of `function`, without calling it.

    Args:
        function: Function whose signature gives the options and whose docstring gives the help.
        command: Name of the subcommand.
        arguments: Arguments after the subcommand.
        positional: Whether parameters without a default are positional arguments.

    Returns:
        Name -> value of every parameter.
    """
    summary = (function.__doc__ or "").split("\n\n    Args:")[0]
    parser = Parser(prog=f"lerobot-grids {command}", description=" ".join(summary.split()))
    parser.examples = examples_of(function)
    parser.add_argument("--config", action="config", help="YAML file with any of these options.")
    parser.add_function_arguments(function, as_group=False, as_positional=positional)
    options = parser.parse_args(switched_on(function, arguments))
    options.pop("config", None)
    return dict(vars(options))


def run(function: Callable[..., Any], command: str, arguments: list[str], *, positional: bool = False) -> Any:
    """`parse`, and call the function."""
    return function(**parse(function, command, arguments, positional=positional))


def switched_on(function: Callable[..., Any], arguments: list[str]) -> list[str]:
    """Expand switches without a value: `--dry-run` becomes `--dry_run=true`.

    Args:
        function: Function or dataclass; its parameters with default false are switches.
        arguments: A command line.
    """
    parameters = signature(function).parameters.values()
    switches = {f"--{parameter.name}" for parameter in parameters if parameter.default is False}
    following = [*arguments[1:], ""]

    def switched(given: str, value: str) -> str:
        name = "--" + given.removeprefix("--").replace("-", "_")
        if not given.startswith("--") or name not in switches:
            return given
        return name if value in ("true", "false") else f"{name}=true"

    # Without arguments there is nothing before the last one's empty follower.
    return [switched(given, value) for given, value in zip(arguments, following, strict=False)]


def refuse(fault: str | None) -> None:
    """Refuse what is wrong with an option, in words.

    Raises:
        OptionError: If something is.
    """
    if fault is not None:
        raise OptionError(fault)


def require_at_least(least: float, **values: float | None) -> None:
    """Refuse options below a minimum; None means that the option was not given.

    Raises:
        OptionError: If a value is too small; the message names the first.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise OptionError(f"--{name} {value}; give at least {least}")
