"""Ctrl-C during a training: finish the step, save it, and stop."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class Interruption:
    """Whether Ctrl-C was pressed."""

    pressed: bool = False


@contextmanager
def stopping_between_steps() -> Iterator[Interruption]:
    """In this block the first Ctrl-C is as a signal to terminate, after which Lightning ends the step and saves.

    The second Ctrl-C stops at once.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread gets signals.
        yield interruption
        return

    def press(number: int, frame: Any) -> None:
        interruption.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step, which is saved; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
