"""lerobot-grids fit. Lightning is imported only when training starts."""

from .fit_checks import check_command_line
from .fit_options import EPILOG, EXAMPLES, FitOptions
from .parser import Parser, switched_on


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    if "--help" in arguments or "-h" in arguments:
        parser = Parser(prog="lerobot-grids fit", description=f"{FitOptions.__doc__} {EPILOG}")
        parser.examples = EXAMPLES
        parser.add_class_arguments(FitOptions)
        parser.add_argument("--config", action="config", help="YAML file with any of these options.")
        parser.parse_args(["--help"])
    check_command_line(arguments)
    from .fit_lightning import fit

    fit(switched_on(FitOptions, arguments))
