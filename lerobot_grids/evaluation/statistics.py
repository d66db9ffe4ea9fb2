"""Intervals and tests for success rates."""

import math
from dataclasses import dataclass

import numpy as np

# Number of random sign flips in the test over several training seeds.
FLIPS = 9999


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    Args:
        successes: Number of successes, or the mean number over repetitions of the same trials.
        trials: Number of trials, at least 1.
        z: Normal quantile; the default gives 95 %.

    Returns:
        (low, high) in [0, 1].
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials is not a proportion")
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # Exactly 0 or 1, where rounding would give a slightly different bound.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


@dataclass(frozen=True)
class Paired:
    """Comparison of one method with another on the same episodes.

    Attributes:
        wins: Number of episodes in which only the first method succeeded, over all training seeds.
        losses: Number of episodes in which only the other method succeeded.
        difference: Difference of the success rates, in [-1, 1].
        interval: 95 % interval of the difference over episodes, for these trained policies.
        p: Two-sided p-value: probability of wins and losses at least this uneven if both methods are equally good.
    """

    wins: int
    losses: int
    difference: float
    interval: tuple[float, float]
    p: float

    def in_points(self, decimals: int = 1) -> str:
        """The difference and its interval in percentage points, as tables show them."""
        centre, low, high = (f"{100 * value:+.{decimals}f}" for value in (self.difference, *self.interval))
        return f"{centre} ({low} to {high})"


def paired_comparison(ours: list[list[bool]], theirs: list[list[bool]], z: float = 1.959964) -> Paired:
    """Compare outcomes of the same episodes.

    With one training seed: McNemar's exact test, and Agresti and Min's interval (Statistics in Medicine, 2005), which
    is Wald's interval with half an observation added to each of the four cells. With several seeds, the outcomes of an
    episode are correlated, so its differences are averaged over the seeds. The interval is then normal over episodes,
    and the test flips the sign of whole episodes at random. Neither includes the variation between trainings.

    Args:
        ours: Outcomes of the first method: one list per training seed, one value per episode.
        theirs: Outcomes of the other method, with the same seeds and episodes.
        z: Normal quantile; the default gives 95 %.
    """
    mine, others = np.array(ours, dtype=float), np.array(theirs, dtype=float)
    if mine.shape != others.shape or not mine.size:
        raise ValueError(f"outcomes of shapes {mine.shape} and {others.shape} cannot be paired")
    apart = mine - others
    wins, losses, difference = int((apart > 0).sum()), int((apart < 0).sum()), float(apart.mean())
    if len(mine) == 1:
        uneven = wins + losses
        tail = sum(math.comb(uneven, i) for i in range(min(wins, losses) + 1)) / 2**uneven
        n, gain, cost = apart.size + 2, wins + 0.5, losses + 0.5
        centre = (gain - cost) / n
        half = z * math.sqrt(gain + cost - (gain - cost) ** 2 / n) / n
        p = min(1.0, 2 * tail)
    else:
        each = apart.mean(0)
        centre, half = difference, z * float(each.std(ddof=1)) / math.sqrt(each.size)
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(FLIPS, each.size))
        extreme = np.abs((signs * each).mean(1)) >= abs(difference) - 1e-12
        p = (1 + int(extreme.sum())) / (1 + FLIPS)
    return Paired(wins, losses, difference, (max(-1.0, centre - half), min(1.0, centre + half)), p)
