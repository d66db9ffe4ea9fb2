"""lerobot-grids: run any LeRobot VLA policy on K sampled visual tokens per camera.

Large packages are imported only when a subcommand needs them, so `--help` is fast.
"""

import logging
import signal
import sys
from difflib import get_close_matches
from importlib import import_module

from .messages import OptionError, fail

# Subcommand -> (module with `main(arguments)`, description).
COMMANDS = {
    "doctor": ("doctor", "check this machine, and whether a policy and a dataset fit it"),
    "record": ("record", "record demonstrations of a scripted expert as a LeRobotDataset"),
    "fit": ("fit", "train a policy on a dataset, dense or with K visual tokens per camera"),
    "validate": ("validate", "measure loss and actions on held-out demonstrations at several token budgets"),
    "bench": ("bench", "count FLOPs and measure milliseconds per stage, with all visual tokens and with K"),
    "eval": ("eval", "measure closed-loop success in simulation, with intervals and films"),
    "compare": ("compare", "compare policies on the same episodes, with paired tests and costs"),
    "view": ("view", "show where a policy looks along an episode: a strip, a film, a rerun recording"),
    "report": ("report", "write one HTML page about a checkpoint: success, looks, costs, training"),
    "serve": ("serve", "answer LeRobot's robot_client: the policy here, the robot on another machine"),
    "export": ("export", "write a policy's graphs for ONNX Runtime, OpenVINO or torch, and run them beside it"),
    "push": ("push", "push a checkpoint to the Hub, with a model card"),
    "pull": ("pull", "fetch a checkpoint from the Hub and check every file"),
    "merge": ("merge", "make a full checkpoint from an adapter"),
    "import-reference": ("import_reference", "make a grids checkpoint of a published GridS one"),
}


def usage() -> str:
    """Help text of the command without a subcommand."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lerobot-grids COMMAND [OPTIONS]",
            "",
            "Run any LeRobot Vision-Language-Action policy on K sampled visual tokens per camera.",
            "",
            "commands:",
            *lines,
            "",
            "lerobot-grids COMMAND --help shows a command's options and examples; --version the version.",
            "Begin with: lerobot-grids doctor",
        ]
    )


def _said(error: Exception) -> str:
    """What an error says; of the operating system's, also what to do."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}; check that path, or give another one"
    return str(error)


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit code: 0, 1 for an error that the user can fix, 2 for a wrong command line, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if sys.version_info < (3, 12):  # noqa: UP036 (a source tree can be run by any Python)
        return fail(
            f"Python {sys.version.split()[0]}; LeRobot needs 3.12 or newer; make the environment with that version"
        )
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["help"]:
        print(usage())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"lerobot-grids {version('lerobot_policy_grids')}")
        return 0
    name, *rest = arguments
    if name == "help":
        name, rest = rest[0], ["--help"]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        advice = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        return fail(f"'{name}' is not a command; {advice}", 2)
    # LeRobot logs dozens of lines where torchcodec finds no FFmpeg, also for data without videos.
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    module = import_module(f".{COMMANDS[name][0]}", __package__)
    # Raise an exception, so that unfinished files are removed as after Ctrl-C. Lightning sets its own handler.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        module.main(rest)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except OptionError as error:
        return fail(str(error))
    except Exception as error:
        # Imported here, because only a failed command needs it.
        from lerobot_policy_grids.errors import GridsError

        if isinstance(error, (GridsError, OSError)):
            # A preflight may find several errors.
            for line in getattr(error, "lines", [_said(error)]):
                fail(line)
            return 1
        if isinstance(error, (RuntimeError, MemoryError)):
            from lerobot_grids.training.memory_advice import is_out_of_memory

            if is_out_of_memory(error):
                advice = "give a smaller --batch_size, fewer --tokens or --cameras, or --device cpu, as the command has"
                return fail(f"out of memory ({str(error).partition('. ')[0].strip()}); {advice}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
