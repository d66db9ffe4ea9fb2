"""Which LeRobot releases this one was run with."""

import logging

import lerobot

OLDEST, NEWEST = (0, 6, 0), (0, 6, 2)


def warn_of_unknown_lerobot() -> None:
    """Say in one line, if it is so, that LeRobot is newer or older than any that was tried."""
    numbers = [int(part) for part in lerobot.__version__.split(".")[:3] if part.isdigit()]
    if not OLDEST <= tuple(numbers) <= NEWEST:
        first, last = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
        logging.getLogger(__name__).warning(
            f"lerobot-grids was run with LeRobot {first} to {last}, and this is {lerobot.__version__}; if something "
            f"fails, install one of those"
        )
