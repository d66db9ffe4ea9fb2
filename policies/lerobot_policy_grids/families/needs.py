"""What a policy needs besides this project and is perhaps not there: packages, and files from the Hub."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from huggingface_hub.errors import HFValidationError

from ..errors import CheckpointError, GridsError, UnsupportedPolicyError, causes, first_line

# Behind it LeRobot says how to install an extra of its own, which lacks this project's packages.
LEROBOTS_LINE = "is required but not installed"


@contextmanager
def needing_packages(policy_type: str, extra: str | None, packages: Sequence[str]) -> Iterator[None]:
    """Around what imports the packages that a policy needs: without them, one line says how to install them.

    Packages are looked for first: without them some of LeRobot's modules are imported all the same, with an empty class
    in the place of a missing one.

    Args:
        policy_type: LeRobot's name of the policy.
        extra: Extra of this distribution that installs them; None where LeRobot alone is enough.
        packages: Names by which they are imported.

    Raises:
        UnsupportedPolicyError: If they are not installed.
    """
    absent = [name for name in packages if find_spec(name) is None]
    if absent:
        raise UnsupportedPolicyError(_line(policy_type, ", ".join(absent), extra))
    try:
        yield
    except ImportError as error:
        if extra is None:
            raise
        said, lerobots, _ = first_line(error).partition(LEROBOTS_LINE)
        raise UnsupportedPolicyError(_line(policy_type, said.strip(" '") if lerobots else said, extra)) from error


def _line(policy_type: str, what: str, extra: str | None) -> str:
    return (
        f"the '{policy_type}' policy needs packages that are not installed ({what}); "
        f"pip install 'lerobot_policy_grids[{extra}]'"
    )


@contextmanager
def needing_files(
    policy_type: str, options: Mapping[str, str], others: Sequence[str], *, fresh: bool
) -> Iterator[None]:
    """Around what fetches files that a policy begins with: without them, one line says which, and what to do.

    Args:
        policy_type: LeRobot's name of the policy.
        options: Option of its configuration -> the repository or folder that it names.
        others: Repositories that no option names.
        fresh: Whether the options can still be changed, because no checkpoint has them.

    Raises:
        CheckpointError: If they are neither here nor on the Hub, or cannot be fetched.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        # Of the operating system, which names a file.
        named = isinstance(error, OSError) and error.filename is not None
        if isinstance(error, GridsError) or named or not (options or others):
            raise
        text = " ".join(str(cause) for cause in causes(error))
        said = {option: place for option, place in options.items() if place in text} or options
        advice = "connect this machine to the network, or log in with hf auth login where its owner asks for that"
        if fresh and said:
            option = next(iter(said))
            advice += (
                f", or give a folder with its files: --base.{option} FOLDER "
                f"(lerobot-train: --policy.base.{option}=FOLDER)"
            )
        places = dict.fromkeys(said.values() or [place for place in others if place in text] or others)
        raise CheckpointError(
            f"the '{policy_type}' policy needs {' and '.join(places)}, which cannot be read or downloaded "
            f"({first_line(error).partition('. ')[0].rstrip('.')}); {advice}"
        ) from error
