"""Perturbed episodes, after LIBERO-Plus (arXiv 2510.13626): kinds at three severities, for MetaWorld and for LIBERO.

The perturbation of an episode depends only on (kind, severity, episode seed). Every policy gets the same episodes, so
results can be paired. The seed chooses the direction and the severity chooses the distance, so a higher severity is a
larger change in the same direction.

To add a kind, write one function (environment, perturbation, random) -> filter of the images, or None; add one line to
`KINDS` of its simulator, and its name to `choices.PERTURBATIONS`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lerobot_policy_grids.errors import SimulationError

from ...choices import SEVERITIES, parts, perturbation_fault
from .saved import SavedScene

# (image uint8 [h, w, 3], name of the camera, random numbers of the step) -> image.
Filter = Callable[[np.ndarray, str, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Perturbation:
    """One kind at one severity."""

    kind: str
    severity: int

    @property
    def strength(self) -> float:
        """Severity as a share of the largest one, in (0, 1]."""
        return self.severity / max(SEVERITIES)

    def random(self, *seeds: int) -> np.random.Generator:
        """Random numbers for this kind in one episode; they are the same for every severity."""
        return np.random.default_rng([*seeds, zlib.crc32(self.kind.encode())])

    def __str__(self) -> str:
        return f"{self.kind}:{self.severity}"


Kind = Callable[[Any, Perturbation, np.random.Generator], Filter | None]


def parse_perturbations(text: str, env: str) -> list[Perturbation]:
    """Perturbations in a list such as "camera:2,light:1"; an empty text gives none.

    Args:
        text: Kinds and severities.
        env: "metaworld" or "libero".

    Raises:
        SimulationError: If a kind or a severity is unknown, or a kind is given twice.
    """
    fault = perturbation_fault(text, env)
    if fault is not None:
        raise SimulationError(fault)
    return [Perturbation(kind, int(severity)) for kind, severity in (part.split(":") for part in parts(text))]


class Perturber:
    """Applies the perturbations of each episode to one environment.

    Args:
        nominal: The scene without perturbations, as it is now.
        kinds: What each kind does.
        perturbations: Perturbations, at most one of each kind.
    """

    def __init__(self, nominal: SavedScene, kinds: dict[str, Kind], perturbations: list[Perturbation]) -> None:
        self._nominal, self._kinds, self._perturbations = nominal, kinds, perturbations
        self._seed: int | None = None
        self._filters: list[tuple[Perturbation, Filter]] = []

    def begin(self, env: Any, seed: int | None) -> None:
        """Perturb the episode of a seed. Without a seed the previous perturbation stays."""
        seed = (self._seed or 0) if seed is None else seed
        if seed == self._seed:
            return
        self._seed = seed
        self._nominal.restore(env)
        made = [(one, self._kinds[one.kind](env, one, one.random(seed))) for one in self._perturbations]
        self._filters = [(one, change) for one, change in made if change is not None]

    def see(self, image: np.ndarray, camera: str, step: int) -> np.ndarray:
        """What is seen of a camera's image uint8 [h, w, 3] at a step, through blur, noise or panels, if there are."""
        for one, change in self._filters:
            image = change(image, camera, one.random(self._seed or 0, step))
        return image
