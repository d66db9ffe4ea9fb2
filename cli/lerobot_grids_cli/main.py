"""lerobot-grids: run any LeRobot VLA policy on K sampled visual tokens per camera.

Nothing heavy is imported before a subcommand needs it, so that `--help` answers at once.
"""

import signal
import sys
from importlib import import_module

# Subcommand -> (module with `main(arguments)`, what it does).
COMMANDS = {
    "record": ("record", "record demonstrations of a scripted expert as a LeRobotDataset"),
    "fit": ("fit", "train a policy on a dataset, dense or with K visual tokens per camera"),
    "validate": ("validate", "measure loss and actions on held-out demonstrations at several token budgets"),
    "bench": ("bench", "count FLOPs and measure milliseconds per stage, dense beside K visual tokens"),
    "eval": ("eval", "measure closed-loop success in simulation, with intervals and films"),
    "compare": ("compare", "set policies side by side on the same episodes, with paired tests and costs"),
    "push": ("push", "push a checkpoint to the Hub, small, pinned and with a card"),
    "pull": ("pull", "fetch a checkpoint from the Hub, every file checked"),
    "merge": ("merge", "make a self-contained checkpoint of an adapter"),
}


def usage() -> str:
    """The help of the command itself."""
    lines = [f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lerobot-grids COMMAND [OPTIONS]",
            "",
            "Run any LeRobot Vision-Language-Action policy on K sampled visual tokens per camera.",
            "",
            "commands:",
            *lines,
            "",
            "lerobot-grids COMMAND --help shows a command's options; --version the version.",
        ]
    )


def fail(message: str, code: int = 1) -> int:
    """Print an error in one line and return the exit code."""
    print(f"lerobot-grids: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit code: 0, 1 for an error that the user can fix, 2 for a wrong command line, 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if sys.version_info < (3, 12):  # noqa: UP036 (a source tree can be run by any Python)
        return fail(f"Python {sys.version.split()[0]}; LeRobot needs 3.12 or newer, make the environment with that")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"lerobot-grids {version('lerobot_policy_grids')}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return fail(f"'{name}' is no command; choose one of {', '.join(COMMANDS)}", 2)
    module = import_module(f".{COMMANDS[name][0]}", __package__)
    # As after Ctrl-C, what was begun is cleared up; Lightning puts its own handler in place.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        module.main(rest)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Exception as error:
        # Only a failed command pays for this import.
        from lerobot_policy_grids.errors import GridsError

        if isinstance(error, (GridsError, OSError)):
            return fail(str(error))
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
