"""TokenSchedule: how many visual tokens per camera a training step uses.

A pure function of the step: every process of a distributed run gets the same budget without asking the others,
and a run that is resumed needs nothing restored.
"""

import math
import random
import re
from dataclasses import dataclass

from .errors import BudgetError

SCHEDULES = ("constant", "linear", "cosine", "exponential", "steps", "elastic")
# Steps of the longest run that a schedule describes.
LONGEST_RUN = 10**9
GRAMMAR = (
    "constant, linear, cosine, exponential, steps:0=144,500=64,1000=16, elastic, elastic:4,8,16 (one of a set) "
    "or elastic:4-64 (a range)"
)


@dataclass(frozen=True)
class TokenSchedule:
    """K over the steps of a training run.

    "linear", "cosine" and "exponential" go from `start` down to `end`; "steps" changes at given steps; "elastic"
    draws anew at each step, so that one checkpoint learns to serve every budget (after MQT-LLaVA and TokenFLEX,
    arXiv 2504.03154).

    Args:
        text: The schedule, in the grammar `GRAMMAR`.
        start: K of the first steps, and the largest that is allowed.
        end: K of the last steps; "constant" has no other.
        steps: Length of the run, which the three that go down need.
        warmup: Share of the steps that stay at `start`.
        settle: Share of the steps that stay at `end`.

    Raises:
        BudgetError: If the text does not follow the grammar, or a budget is not within 1 .. start.
    """

    text: str
    start: int
    end: int
    steps: int = 0
    warmup: float = 0.1
    settle: float = 0.4

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES or (self.argument and self.kind not in ("steps", "elastic")):
            raise BudgetError(f"token schedule '{self.text}' is unknown; choose {GRAMMAR}")
        if not (self.warmup >= 0 and self.settle >= 0 and self.warmup + self.settle <= 1):
            raise BudgetError(
                f"a token schedule with warm-up {self.warmup} and settle {self.settle}; give shares of the run, "
                "at most 1 together"
            )
        if not 0 <= self.steps <= LONGEST_RUN:
            raise BudgetError(f"a token schedule over {self.steps} steps; give 0 .. {LONGEST_RUN}")
        budgets = [k for _, k in self._changes] if self.kind == "steps" else self._choices
        wrong = [k for k in budgets if not 1 <= k <= self.start]
        if wrong:
            raise BudgetError(
                f"token schedule '{self.text}' asks for {wrong[0]} tokens; choose from 1 .. {self.start}, or raise "
                "num_tokens_max"
            )

    @property
    def kind(self) -> str:
        """Name of the schedule."""
        return self.text.partition(":")[0]

    @property
    def argument(self) -> str:
        """What follows the name."""
        return self.text.partition(":")[2]

    @property
    def goes_down(self) -> bool:
        """Whether it comes down from `start` over the run."""
        return self.kind in ("linear", "cosine", "exponential")

    def at(self, step: int) -> int:
        """K of a step, counted from 0.

        Raises:
            BudgetError: If the schedule needs the length of the run and has none.
        """
        if self.kind == "constant":
            return self.end
        if self.kind == "steps":
            return [k for first, k in self._changes if first <= step][-1]
        if self.kind == "elastic":
            return self._draw(random.Random(step))
        if self.steps < 1:
            raise BudgetError(
                f"token schedule '{self.text}' goes down over the run, whose length is not known; set schedule_steps"
            )
        moving = max(1.0, (1 - self.warmup - self.settle) * self.steps)
        progress = min(1.0, max(0.0, (step - self.warmup * self.steps) / moving))
        if self.kind == "exponential":
            return round(self.start * (self.end / self.start) ** progress)
        if self.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return round(self.start + (self.end - self.start) * progress)

    def budgets(self) -> set[int]:
        """Every K that a run can ask for; all on the way down where its length is not known."""
        if self.kind == "constant":
            return {self.end}
        if self.kind == "steps":
            return {k for _, k in self._changes}
        if self.kind == "elastic":
            return set(self._choices if self._is_set else range(self._choices[0], self._choices[1] + 1))
        if self.steps < 1:
            return set(range(self.end, self.start + 1))
        return self._between(0, self.steps - 1)

    def _between(self, first: int, last: int) -> set[int]:
        """Every K from step `first` to step `last` of a schedule that only goes down."""
        if self.at(first) == self.at(last):
            return {self.at(first)}
        middle = (first + last) // 2
        return self._between(first, middle) | self._between(middle + 1, last)

    def _draw(self, source: random.Random) -> int:
        if self._is_set:
            return source.choice(self._choices)
        low, high = self._choices
        # Evenly in the logarithm: 1 to 2 tokens matters as much as 64 to 128.
        return min(high, int(low * ((high + 1) / low) ** source.random()))

    @property
    def _is_set(self) -> bool:
        return bool(self.argument) and "-" not in self.argument

    @property
    def _choices(self) -> list[int]:
        """Of an elastic budget: the set, or the two ends of the range."""
        if self.kind != "elastic":
            return []
        if not self.argument:
            return [1, self.start]
        if re.fullmatch(r"\d+-\d+", self.argument):
            return sorted(int(k) for k in self.argument.split("-"))
        if re.fullmatch(r"\d+(,\d+)*", self.argument):
            return [int(k) for k in self.argument.split(",")]
        raise BudgetError(f"token schedule '{self.text}' cannot be read; choose {GRAMMAR}")

    @property
    def _changes(self) -> list[tuple[int, int]]:
        """Of a step list: (first step, K), in order."""
        if not re.fullmatch(r"0=\d+(,\d+=\d+)*", self.argument):
            raise BudgetError(f"token schedule '{self.text}' cannot be read; write steps:0=144,500=64,1000=16")
        pairs = [part.split("=") for part in self.argument.split(",")]
        return sorted((int(first), int(k)) for first, k in pairs)
