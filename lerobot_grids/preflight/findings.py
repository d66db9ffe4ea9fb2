"""What a check found: one line each, an error or a warning."""

from collections.abc import Iterable
from dataclasses import dataclass

from lerobot_policy_grids.errors import DatasetError


@dataclass(frozen=True)
class Finding:
    """Something that does not fit, or that works and may surprise.

    Attributes:
        line: What was seen, what was expected, and what to do.
        is_error: Whether it would fail later, or give a wrong policy without a word.
    """

    line: str
    is_error: bool = True


class PreflightError(DatasetError):
    """Several errors of a dataset, a policy and their options."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = list(lines)
        super().__init__("; ".join(self.lines))


def refuse_errors(findings: Iterable[Finding]) -> None:
    """Raise `PreflightError` if any finding is an error."""
    errors = [finding.line for finding in findings if finding.is_error]
    if errors:
        raise PreflightError(errors)


def warning(line: str) -> Finding:
    """A finding that is no error."""
    return Finding(line, is_error=False)
