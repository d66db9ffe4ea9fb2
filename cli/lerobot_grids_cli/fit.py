"""lerobot-grids fit. Lightning is imported only when training starts."""

from .fit_options import EPILOG, FitOptions
from .parser import Parser


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    if "--help" in arguments or "-h" in arguments:
        parser = Parser(prog="lerobot-grids fit", description=f"{FitOptions.__doc__} {EPILOG}")
        parser.add_class_arguments(FitOptions)
        parser.add_argument("--config", action="config", help="YAML file with any of these options.")
        parser.parse_args(["--help"])
    from .fit_lightning import fit

    # A switch that is given alone is on.
    following = [*arguments[1:], ""]
    fit(
        [
            "--resume=true" if argument == "--resume" and after not in ("true", "false") else argument
            for argument, after in zip(arguments, following, strict=True)
        ]
    )
