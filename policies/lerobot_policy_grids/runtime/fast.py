"""The fast path of a policy, which is held against the slow one before it acts.

The first observation of each shape is computed both ways from the same noise. How far the two are apart is printed. Up
to a bound the fast path acts from then on; beyond it, or where it cannot be built, the policy goes on as before and
a warning says why.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import GridsError, first_line
from .flow import integrate
from .phases import Phases, UnavailableError
from .precision import PRECISIONS, precisely, round_vision
from .program import Loop, Program
from .quantised import QUANTISATIONS, quantise
from .weights import Mark, Parking, mark

RUNTIMES = ("auto", "eager", "fast", "compiled")

# Largest difference between the two paths, as a share of the range of the actions. Both round in other places:
# docs/speed.md has how far apart they were found.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# Of float32 where matrix products round their inputs to 10 bits.
TF32_BOUND = 2e-2
# And to 7 bits, as with a vision tower in bfloat16.
BF16_BOUND = BOUNDS[torch.bfloat16]
# With weights of 8 bits.
INT8_BOUND = 5e-2

# Shapes of observations that are kept. On a GPU each has memory of its own for what its graphs compute.
MOST_PROGRAMS = 16


class Comparison(NamedTuple):
    """How far two action chunks are apart.

    Attributes:
        of: What is compared.
        share: (What the fast path gave, what the slow one gave) to the difference as a share of the range of that.
    """

    of: str
    share: Callable[[Tensor, Tensor], float]


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / (expected.max() - expected.min()).clamp_min(1e-9))


BY_VALUES = Comparison("actions", _apart)


class FastRuntime:
    """Runs a policy's two phases in place of its own loop, where that gives the same actions.

    Args:
        name: "fast" or "compiled".
        quantisation: One of `QUANTISATIONS`: of the weights of trunk and action expert.
        precision: One of `PRECISIONS`: of products of float32 in the fast path, and for "bf16" also of its vision
            tower. The slow one, against which it is held, then computes as float32.
        build: (numbers of the cameras, denoising steps) to the phases; raises UnavailableError.
        budget: Numbers of the cameras to what says how their tokens are reduced at the moment.
        weights: The modules whose weights the phases use.
        blocked: Why the phases must not be used at the moment; None if they may.

    Attributes:
        acting: Whether the policy is asked for actions, and not for a loss.
        differences: What was found of each shape of observation: the share of the range of the actions, or why the
            policy acts without the fast path.
        programs: What acts for each shape, the last ones used; None where the slow path does.
    """

    def __init__(
        self,
        name: str,
        quantisation: str = "none",
        precision: str = "own",
        *,
        build: Callable[[list[int], int], Phases],
        budget: Callable[[list[int]], Any],
        weights: Callable[[], Iterable[nn.Module]],
        blocked: Callable[[], str | None],
    ) -> None:
        self.name, self.quantisation, self.precision = name, quantisation, precision
        self.title = f"runtime={name}" + ("" if quantisation == "none" else f" quantise={quantisation}")
        self.title += "" if precision == "own" else f" precision={precision}"
        self._build, self._budget, self._weights, self._blocked = build, budget, weights, blocked
        self.acting = False
        self.differences: dict[Any, float | str] = {}
        self._phases: dict[Any, Phases] = {}
        self.programs: dict[Any, Program | None] = {}
        self._mark: Mark | None = None
        self._parked = Parking()
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its own weights, and graphs cannot be copied.
        empty: dict[str, Any] = {name: {} for name in ("_phases", "programs", "differences")}
        return vars(self) | empty | {"_mark": None, "acting": False}

    @contextmanager
    def act(self) -> Iterator[None]:
        """In this block the policy is asked for actions."""
        before, self.acting = self.acting, True
        try:
            yield
        finally:
            self.acting = before

    def chunk(
        self,
        observation: Any,
        noise: Tensor,
        *,
        cameras: list[int],
        steps: int,
        eager: Callable[[], Tensor],
        loop: Loop = integrate,
        compare: Comparison | None = None,
    ) -> Tensor:
        """An action chunk [b, t, a].

        Args:
            observation: What the policy sees: `Observation`, or another NamedTuple of what its prefill takes.
            noise: What it starts from, [b, t, a].
            cameras: Numbers of the cameras whose images these are.
            steps: Denoising steps.
            eager: The slow path, from the same observation and noise.
            loop: Runs the denoising steps.
            compare: How far apart two chunks are, if not by their values.
        """
        reason = self._blocked() or _blocked_by_torch(noise)
        if reason is not None:
            self._warn(reason)
            return eager()
        self._notice_changes()
        shapes = tuple((value.shape, value.dtype) for value in (*observation, noise))
        # Those of the process are part of what a graph recorded.
        products = torch.get_float32_matmul_precision() if self.precision == "own" else None
        key = (shapes, noise.device, tuple(cameras), self._budget(cameras), steps, products)
        # Tensors of inference mode cannot be written to outside it, and graphs keep some.
        with torch.inference_mode(False), torch.no_grad():
            observation, noise = observation._make(map(_own, observation)), _own(noise)
            if key not in self.programs:
                return self._first(key, observation, noise, cameras, steps, eager, loop, compare or BY_VALUES)
            # The last one used is the last to be dropped.
            program = self.programs[key] = self.programs.pop(key)
            if program is not None:
                with precisely(self.precision):
                    return program(observation, noise, loop)
        return eager()

    def _first(
        self,
        key: Any,
        observation: Any,
        noise: Tensor,
        cameras: list[int],
        steps: int,
        eager: Callable[[], Tensor],
        loop: Loop,
        compare: Comparison,
    ) -> Tensor:
        """Build the program for observations of a shape, and hold it against the slow path."""
        with precisely("own" if self.precision == "own" else "fp32"):
            expected = eager()
        if not bool(expected.isfinite().all()):
            # Nothing can be learnt from it, and whoever asked refuses it.
            return expected
        try:
            with precisely(self.precision):
                phases = self._phases_of(cameras, steps)
                if noise.is_cuda or self.name == "compiled":
                    _require_no_switches(phases)
                program = Program(phases, steps, observation, noise, compiled=self.name == "compiled")
                found = program(observation, noise, loop)
        except Exception as error:  # whatever it is, the robot can act without
            kind = "" if isinstance(error, GridsError) else f"{type(error).__name__}: "
            self._refuse(key, f"{kind}{first_line(error)}")
            return expected
        difference = compare.share(found, expected)
        bound = self._bound(noise.device, [phases.prefill, phases.denoise_step])
        if not difference <= bound:
            apart = f"{difference:.1e} of the range of the {compare.of}"
            self._refuse(key, f"its first action chunk differs by {apart}, more than {bound:.0e}")
            return expected
        self._keep(key, program, difference)
        print(
            f"{self.title}: {len(cameras)} cameras, {_described(self._budget(cameras))} visual "
            f"tokens{_words(observation)} on {noise.device}: the first action chunk differs from the eager one by "
            f"{difference:.1e} of the range of the {compare.of} (at most {bound:.0e})",
            file=sys.stderr,
            flush=True,
        )
        self._park(phases)
        return expected

    def _phases_of(self, cameras: list[int], steps: int) -> Phases:
        """Phases do not depend on K or the length of instructions, and hold copies of weights: they are shared."""
        budget = self._budget(cameras)
        key = (tuple(cameras), steps, None if budget is None else budget[0])
        if key not in self._phases:
            phases = self._build(cameras, steps)
            quantise(phases, self.quantisation)
            if self.precision == "bf16":
                round_vision(phases)
            self._phases[key] = phases
        return self._phases[key]

    def _bound(self, device: torch.device, phases: Iterable[nn.Module] = ()) -> float:
        """By the least exact weights of the policy and of these phases, which may have copies."""
        dtypes = {weight.dtype for module in (*self._weights(), *phases) for weight in module.parameters()}
        bound = max(BOUNDS.get(dtype, BOUNDS[torch.float32]) for dtype in dtypes)
        if self.quantisation != "none":
            bound = max(bound, INT8_BOUND)
        if self.precision == "bf16":
            return max(bound, BF16_BOUND)
        with precisely(self.precision):
            products = torch.get_float32_matmul_precision()
        if products == "highest" or (device.type != "cuda" and self.precision == "own"):
            return bound
        # On a GPU "medium" is TF32, too.
        return max(bound, TF32_BOUND)

    def _refuse(self, key: Any, reason: str) -> None:
        self._keep(key, None, reason)
        self._warn(reason)

    def _keep(self, key: Any, program: Program | None, found: float | str) -> None:
        """Keep what acts for a shape, and drop what was not used for longest if there are too many."""
        self.programs[key], self.differences[key] = program, found
        while len(self.programs) > MOST_PROGRAMS:
            oldest = next(iter(self.programs))
            del self.programs[oldest], self.differences[oldest]
            used = [kept.phases for kept in self.programs.values() if kept is not None]
            self._phases = {key: phases for key, phases in self._phases.items() if phases in used}

    def try_again(self) -> None:
        """Forget shapes for which the slow path acts: what failed may be over, such as a lack of memory."""
        for key in [key for key, program in self.programs.items() if program is None]:
            del self.programs[key], self.differences[key]
        self._said.clear()

    def _warn(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logging.getLogger(__name__).warning(f"{self.title} is not used, the policy acts eagerly: {reason}")

    def _notice_changes(self) -> None:
        now = mark(self._weights(), self._parked)
        if self._mark is not None and now != self._mark:
            self.forget()
            now = mark(self._weights())
        self._mark = now

    def forget(self) -> None:
        """Drop what was computed from weights; the next observation is computed both ways again."""
        for stored in (self._phases, self.programs, self.differences):
            stored.clear()
        self._mark = None
        self._parked.bring_back()

    def _park(self, phases: Phases) -> None:
        """Keep weights that no phase reads out of the GPU's memory; `forget` brings them back."""
        used = {id(weight) for phase in (phases.prefill, phases.denoise_step) for weight in phase.parameters()}
        for module in phases.unused:
            weights = list(module.parameters())
            if weights and weights[0].is_cuda and used.isdisjoint(map(id, weights)):
                self._parked.park(module, self._weights())
        self._mark = mark(self._weights(), self._parked)


def _blocked_by_torch(noise: Tensor) -> str | None:
    if noise.is_meta:
        return "meta tensors have no values to compare"
    if torch.is_autocast_enabled(noise.device.type):
        return "autocast is on, which the phases would not follow; give the policy a dtype instead"
    return None


def _require_no_switches(phases: Phases) -> None:
    """Refuse low-rank matrices that PEFT can switch off, which neither a graph nor compiled code notices."""
    for phase in (phases.prefill, phases.denoise_step):
        if any(hasattr(module, "active_adapters") and not module.merged for module in phase.modules()):
            raise UnavailableError("low-rank matrices can be switched off while they are not merged; merge them")


def _own(value: Tensor) -> Tensor:
    return value.clone() if value.is_inference() else value


def _words(observation: Sequence[Tensor]) -> str:
    tokens = getattr(observation, "tokens", None)
    return "" if tokens is None else f", {tokens.shape[1]} language tokens"


def _described(budget: Any) -> str:
    return "all" if budget is None else " + ".join(str(count) for count in budget[1])


__all__ = ["PRECISIONS", "QUANTISATIONS", "RUNTIMES", "FastRuntime", "UnavailableError"]
