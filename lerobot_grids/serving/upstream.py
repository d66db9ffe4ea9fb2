"""LeRobot's policy server, imported without the log file that it writes into the current folder."""

import logging
from types import SimpleNamespace
from typing import Any

from lerobot_policy_grids.errors import GridsError


def import_policy_server() -> Any:
    """LeRobot's module, whose messages are read by `unpickling.loads` in place of pickle's.

    Raises:
        GridsError: If its packages are missing, or this LeRobot has no such server.
    """
    try:
        from lerobot.async_inference import helpers
    except ImportError as error:
        raise GridsError(
            f"LeRobot's asynchronous inference cannot be imported ({error}); pip install 'lerobot_policy_grids[serve]'"
        ) from error
    before = helpers.get_logger
    helpers.get_logger = logging.getLogger
    try:
        from lerobot.async_inference import policy_server
    except ImportError as error:
        raise GridsError(
            f"this LeRobot has no policy server that robot_client talks to ({error}); install LeRobot 0.6"
        ) from error
    finally:
        helpers.get_logger = before
    from . import unpickling

    policy_server.pickle = SimpleNamespace(loads=unpickling.loads, dumps=policy_server.pickle.dumps)
    return policy_server
