"""Seconds of repetitions of a function, in total and by the stages that methods of objects are."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Timed:
    """A method that is a stage.

    Attributes:
        owner: The object that has it.
        method: Its name.
        stage: "vision" is timed at each call. "steps" lasts from the first call to the end, and everything before it is
            "prefill".
    """

    owner: Any
    method: str
    stage: str


def synchronised(device: str, clock: str) -> float:
    """Seconds of a clock of `CLOCKS`, after all that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return CLOCKS[clock]()


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """In this block a method of an object is what `make` makes of it."""
    method, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, make(method))
    try:
        yield
    finally:
        setattr(owner, name, method) if own else delattr(owner, name)


def within(timed: Timed, enter: Callable[[str], AbstractContextManager[None]]) -> AbstractContextManager[None]:
    """In this block each call of a stage's method runs in a block of its own, given the stage's name."""

    def make(method: Callable[..., Any]) -> Callable[..., Any]:
        def entered(*args: Any, **kwargs: Any) -> Any:
            with enter(timed.stage):
                return method(*args, **kwargs)

        return entered

    return replaced(timed.owner, timed.method, make)


def run_once(
    function: Callable[[], Any], stages: Iterable[Timed], now: Callable[[], float]
) -> tuple[dict[str, float], Any]:
    """Seconds of one run by stage and in total, and what it returned.

    To time a stage waits for the device: for "steps" once, for "vision" at each call.
    """
    first_step: list[float] = []
    vision: list[float] = []

    @contextmanager
    def enter(stage: str) -> Iterator[None]:
        start = now() if stage == "vision" or not first_step else 0.0
        if stage == "steps" and not first_step:
            first_step.append(start)
        yield
        if stage == "vision":
            vision.append(now() - start)

    with ExitStack() as stack:
        for timed in stages:
            stack.enter_context(within(timed, enter))
        start = now()
        result = function()
        end = now()
    seconds = {"total": end - start}
    if vision:
        seconds["vision"] = sum(vision)
    if first_step:
        seconds |= {"prefill": first_step[0] - start, "steps": end - first_step[0]}
    return seconds, result


def repeat(
    function: Callable[[], Any], stages: list[Timed], device: str, clock: str, repeats: int
) -> tuple[dict[str, list[float]], Any]:
    """Seconds of each repetition by stage and in total, and what the last one returned.

    On a GPU each repetition is two runs, because waiting makes the whole slower: the total is that of a run without
    stages, and all stages are those of one run, in which "prefill" and "steps" are the whole.
    """
    now = partial(synchronised, device, clock)
    seconds: dict[str, list[float]] = {}
    result: Any = None
    for _ in range(repeats):
        parts, result = run_once(function, stages, now)
        if device.startswith("cuda"):
            whole, result = run_once(function, [], now)
            parts |= whole
        for stage, value in parts.items():
            seconds.setdefault(stage, []).append(value)
    return seconds, result
