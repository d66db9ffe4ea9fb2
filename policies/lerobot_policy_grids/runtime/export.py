"""The two phases as programs of torch.export, functions of tensors with names.

The cache between them is a list of tensors: what the prefill gives under a name, the denoising step takes under it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .phases import Cache, Observation, Phases

PREFILL, DENOISE_STEP = "prefill", "denoise_step"


@dataclass(frozen=True)
class Graph:
    """A phase as a program.

    Attributes:
        name: "prefill" or "denoise_step".
        program: It takes the inputs and gives the outputs in their order, without names.
        inputs: Name -> example. Their shapes are fixed.
        outputs: Name -> what it gives for the examples.
    """

    name: str
    program: ExportedProgram
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class _Prefill(nn.Module):
    def __init__(self, phase: nn.Module) -> None:
        super().__init__()
        self.phase = phase

    def forward(self, *observation: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_flatten(self.phase(*observation))[0])


class _DenoiseStep(nn.Module):
    def __init__(self, phase: nn.Module, form: TreeSpec) -> None:
        super().__init__()
        self.phase, self.form = phase, form

    def forward(self, x_t: Tensor, step: Tensor, *cache: Tensor) -> Tensor:
        velocity: Tensor = self.phase(tree_unflatten(list(cache), self.form), x_t, step)
        return velocity


@torch.no_grad()
def export_phases(phases: Phases, observation: Observation, noise: Tensor) -> tuple[Graph, Graph]:
    """Trace both phases for observations of this shape.

    Args:
        phases: Of the policy, in evaluation mode.
        observation: An example.
        noise: An example, [b, t, a].

    Returns:
        (The prefill, of `Observation`'s fields, to the cache; the denoising step, of "x_t", "step" int64 [1] and the
        cache, to "velocity").
    """
    cache = phases.prefill(*observation)
    tensors, form = tree_flatten(cache)
    named = dict(zip(_names(cache), tensors, strict=True))
    prefill = torch.export.export(_Prefill(phases.prefill), tuple(observation), strict=False)
    given = {"x_t": noise, "step": torch.zeros(1, dtype=torch.int64, device=noise.device), **named}
    step = _DenoiseStep(phases.denoise_step, form)
    denoise_step = torch.export.export(step, tuple(given.values()), strict=False)
    return (
        Graph(PREFILL, prefill, observation._asdict(), named),
        Graph(DENOISE_STEP, denoise_step, given, {"velocity": step(*given.values())}),
    )


def _names(cache: Cache) -> list[str]:
    """Names of a cache's tensors, in the order in which they are flattened."""
    keys_values = [f"keys_values.{number}" for number in range(len(cache.keys_values))]
    extra = [f"extra.{number}" for number in range(len(cache.extra))]
    return [*keys_values, "mask", "rotation.cos", "rotation.sin", *extra]
