"""lerobot-grids fit. Lightning is imported only when training starts."""

import sys

from lerobot_grids.budgets import budget_fault

from .fit_options import EPILOG, FitOptions
from .messages import fail
from .parser import Parser, switched_on


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    if "--help" in arguments or "-h" in arguments:
        parser = Parser(prog="lerobot-grids fit", description=f"{FitOptions.__doc__} {EPILOG}")
        parser.add_class_arguments(FitOptions)
        parser.add_argument("--config", action="config", help="YAML file with any of these options.")
        parser.parse_args(["--help"])
    fault = budget_fault(_value_of("--tokens", arguments) or "dense")
    if fault is not None:
        sys.exit(fail(fault))
    from .fit_lightning import fit

    fit(switched_on(FitOptions, arguments))


def _value_of(option: str, arguments: list[str]) -> str | None:
    """The value of an option on a command line, before a parser with heavy imports reads it."""
    for given, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = given.partition("=")
        if name == option:
            return value if equals else following
    return None
