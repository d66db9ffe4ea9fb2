"""A line of the doctor."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """What was looked at.

    Attributes:
        status: "ok", "warn" for what works less well or for some uses only, "fail" for what does not work.
        name: What was looked at, in a word or two.
        seen: What was found.
        advice: What to do about it; empty where there is nothing to do.
    """

    status: Status
    name: str
    seen: str
    advice: str = ""

    @property
    def text(self) -> str:
        """The check in words, without its status."""
        return f"{self.name}: {self.seen}" + (f"; {self.advice}" if self.advice else "")

    def to_dict(self) -> dict[str, str]:
        """Return all fields as plain values."""
        return asdict(self)


Checker = Callable[[], Iterable[Check]]


def run_checks(checkers: Iterable[tuple[str, Checker]]) -> Iterator[Check]:
    """Run checks one after the other. One that raises is a failure, and the next one runs.

    Args:
        checkers: Name and function of each.
    """
    for name, checker in checkers:
        try:
            yield from checker()
        except Exception as error:  # whatever a broken installation raises
            # Not `errors.first_line`: the policy package may not be importable here.
            said = str(error).strip().splitlines() or [""]
            yield Check(
                "fail", name, f"{type(error).__name__}: {said[0]}", "mend what this names, and run doctor again"
            )


def from_findings(name: str, findings: Iterable[Any], nothing: str) -> Iterator[Check]:
    """A line for each finding of the preflight; one that all is well, where there are none."""
    found = list(dict.fromkeys(findings))
    if not found:
        yield Check("ok", name, nothing)
    for finding in found:
        yield Check("fail" if finding.is_error else "warn", name, finding.line)
