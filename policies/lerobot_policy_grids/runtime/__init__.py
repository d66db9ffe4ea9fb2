"""How a policy's action chunks are computed: prefill and denoising step as plain modules, and a fast path of them.

It knows torch and no policy: `families.phases` has those of each family, made of its modules.
"""

from .fast import PRECISIONS, QUANTISATIONS, RUNTIMES, Comparison, FastRuntime
from .phases import Cache, Observation, Phases, UnavailableError

__all__ = [
    "PRECISIONS",
    "QUANTISATIONS",
    "RUNTIMES",
    "Cache",
    "Comparison",
    "FastRuntime",
    "Observation",
    "Phases",
    "UnavailableError",
]
