"""The phases of a policy as they are run: as they are, compiled, or recorded as CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .flow import integrate
from .graphs import RecordedFunction
from .phases import Phases

Velocity = Callable[[Tensor, Tensor], Tensor]
Loop = Callable[[Velocity, Tensor, Tensor], Tensor]


class Program:
    """Action chunks from observations of one shape.

    Args:
        phases: Built for such observations.
        steps: Denoising steps.
        observation: An example.
        noise: An example, [b, t, a].
        compiled: Whether torch compiles both phases. It does so at the first call.

    Attributes:
        phases: As given.
        numbers: int64 [steps], of the steps.
        prefill: (*observation) to a cache. On a GPU it is overwritten by the next call.
        denoise_step: (cache, x_t, number of the step int64 [1]) to a velocity. On a GPU it is overwritten by the next
            call, and the cache must be the one of `prefill`.
    """

    def __init__(
        self, phases: Phases, steps: int, observation: tuple[Tensor, ...], noise: Tensor, *, compiled: bool
    ) -> None:
        self.phases = phases
        self.numbers = torch.arange(steps, device=noise.device)
        self.prefill: Callable[..., tuple[Any, ...]] = phases.prefill
        self.denoise_step: Callable[[Any, Tensor, Tensor], Tensor] = phases.denoise_step
        if compiled:
            self.prefill = torch.compile(phases.prefill, fullgraph=True, dynamic=False)
            self.denoise_step = torch.compile(phases.denoise_step, fullgraph=True, dynamic=False)
        if noise.is_cuda:
            # Streams and graphs belong to the device of the moment.
            with torch.cuda.device(noise.device):
                self._record(observation, noise)

    def __call__(self, observation: tuple[Tensor, ...], noise: Tensor, loop: Loop = integrate) -> Tensor:
        """The action chunk [b, t, a] that denoising leaves of the noise."""
        cache = self.prefill(*observation)

        def velocity(x_t: Tensor, number: Tensor) -> Tensor:
            with torch.no_grad():
                return self.denoise_step(cache, x_t, number)

        return loop(velocity, self.phases.start(cache, noise), self.numbers)

    def _record(self, observation: tuple[Tensor, ...], noise: Tensor) -> None:
        """Replace both phases by CUDA graphs; one graph serves all steps.

        They are recorded from zeros: a graph that does not follow its inputs then fails the first comparison, which is
        made with the observation.
        """
        prefill = RecordedFunction(self.prefill, (), tuple(map(torch.zeros_like, observation)))
        step = RecordedFunction(self.denoise_step, (prefill.result,), (torch.zeros_like(noise), self.numbers[:1]))

        def denoise_step(cache: Any, x_t: Tensor, number: Tensor) -> Tensor:
            # The graph reads the cache where `prefill` leaves it.
            velocity: Tensor = step(x_t, number)
            return velocity

        self.prefill, self.denoise_step = prefill, denoise_step
