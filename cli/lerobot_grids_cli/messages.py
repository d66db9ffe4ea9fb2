"""Error messages as the terminal shows them."""

import re
import sys

# Characters of the longest message: its start says what was seen, its end what to do.
START, END = 1000, 480
_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class OptionError(Exception):
    """An option that cannot be used, found without heavy imports. The message says what to give instead."""


def one_line(message: str) -> str:
    """A message without line breaks and control characters; the middle of a long one is left out."""
    plain = "".join(c if c.isprintable() else " " for c in _ESCAPE.sub("", message))
    text = " ".join(plain.split())
    return text if len(text) <= START + END else f"{text[:START]} … {text[-END:]}"


def fail(message: str, code: int = 1) -> int:
    """Print an error in one line and return the exit code."""
    print(f"lerobot-grids: error: {one_line(message)}", file=sys.stderr)
    return code
