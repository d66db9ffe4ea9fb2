"""What can be wrong with the main options of `fit`, found before anything heavy is imported."""

from dataclasses import fields
from typing import Any

from lerobot_grids.budgets import budget_fault
from lerobot_grids.choices import logger_fault

from .fit_options import FitOptions
from .messages import OptionError
from .parser import Parser, refuse, require_at_least, switched_on, unknown_option

OWN = [field.name for field in fields(FitOptions)]
# LightningCLI's options, and groups of options.
LIGHTNING = ["config", "print_config", "help", "help_all", "seed_everything", "trainer", "model", "data"]
LIGHTNING += ["optimizer", "lr_scheduler"]


def check_command_line(arguments: list[str]) -> None:
    """Check the main options on a command line. The rest is for LightningCLI, and a --config file too.

    Raises:
        OptionError: If an option is unknown, or a value cannot be used.
    """
    given = switched_on(FitOptions, arguments)
    main: list[str] = []
    for flag, following in zip(given, [*given[1:], "--"], strict=True):
        if not flag.startswith("--"):
            continue
        name = flag.removeprefix("--").partition("=")[0]
        root = name.partition(".")[0].rstrip("+")
        if root in OWN:
            main += [flag] if "=" in flag or following.startswith("--") else [flag, following]
        elif root not in LIGHTNING:
            raise OptionError(unknown_option(f"--{name}", [f"--{known}" for known in (*OWN, *LIGHTNING)]))
    parser = Parser(prog="lerobot-grids fit")
    parser.add_class_arguments(FitOptions)
    # The dataset may be in a --config file.
    check_values(parser.parse_args(["--dataset=unknown", *main]))


def check_values(options: Any) -> None:
    """Check the values of the main options.

    Raises:
        OptionError: If one cannot be used; the message says what to give.
    """
    refuse(None if options.tokens is None else budget_fault(str(options.tokens)))
    require_at_least(1, steps=options.steps, batch_size=options.batch_size, save_every=options.save_every)
    require_at_least(1, resolution=options.resolution, push_every=options.push_every)
    if not 0 <= options.distill <= 1:
        raise OptionError(f"--distill {options.distill}; give the teacher's share of the loss, from 0 to 1")
    refuse(None if options.logger is None else logger_fault(options.logger))
    every = options.push_every
    if every is not None and options.push is None:
        raise OptionError(f"--push_every {every} without --push; give --push user/name, or drop it")
    if every is not None and every % options.save_every:
        raise OptionError(
            f"--push_every {every} with --save_every {options.save_every}: a checkpoint must be saved before the "
            "push; give a multiple"
        )
