"""Errors a user can act on. Each message says what was seen, what was expected and what to do."""

from collections.abc import Iterator


class GridsError(Exception):
    """Base of every error this project raises for a user mistake or a bad file."""


class UnsupportedPolicyError(GridsError):
    """The policy has no dense grid of visual tokens that a family in `families/` describes."""


class TokenGridError(GridsError):
    """A feature map does not have the (H, W) token grid the sampler was built for."""


class BudgetError(GridsError):
    """A token budget lies outside 1 .. num_tokens_max, or above the grid's H * W tokens."""


class CheckpointError(GridsError):
    """A checkpoint is missing, incomplete, damaged or does not fit its configuration."""


class NoConfigError(CheckpointError):
    """A folder is there, perhaps fetched from the Hub, and holds no config.json."""


class DatasetError(GridsError):
    """A dataset is missing, unreadable or does not fit the policy."""


class SimulationError(GridsError):
    """A simulator, a task or its renderer is not available."""


class OutputExistsError(GridsError):
    """An output folder exists already and would be overwritten."""


class HubError(GridsError):
    """The Hub refused something, or cannot be reached."""


class DiskFullError(GridsError, OSError):
    """A file cannot be written, because its disk is full."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from or while handling, newest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
