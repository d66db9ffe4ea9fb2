"""Intervals and tests for success rates."""

import math
from dataclasses import dataclass


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    Args:
        successes: Number of successes.
        trials: Number of trials, at least 1.
        z: Normal quantile; the default gives 95 %.

    Returns:
        (low, high) in [0, 1].
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials is no proportion")
    rate = successes / trials
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # Exact where rounding would leave a hair.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


@dataclass(frozen=True)
class Paired:
    """How one way of acting fares against another on the same episodes.

    Attributes:
        wins: Episodes in which only it succeeded.
        losses: Episodes in which only the other did.
        difference: Of the success rates, in [-1, 1].
        interval: Its 95 % interval.
        p: Two-sided p-value of McNemar's exact test: how likely so uneven wins and losses are if both are as good.
    """

    wins: int
    losses: int
    difference: float
    interval: tuple[float, float]
    p: float


def paired_comparison(ours: list[bool], theirs: list[bool], z: float = 1.959964) -> Paired:
    """Compare outcomes of the same episodes.

    The interval is Agresti and Min's (Statistics in Medicine, 2005): Wald's with half an observation added to each of
    the four cells.

    Args:
        ours: Outcome of each episode.
        theirs: The other's, episode by episode.
        z: Normal quantile; the default gives 95 %.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} outcomes beside {len(theirs)} cannot be paired")
    pairs = list(zip(ours, theirs, strict=True))
    wins, losses = pairs.count((True, False)), pairs.count((False, True))
    uneven = wins + losses
    tail = sum(math.comb(uneven, i) for i in range(min(wins, losses) + 1)) / 2**uneven
    n, gain, cost = len(pairs) + 2, wins + 0.5, losses + 0.5
    centre = (gain - cost) / n
    half = z * math.sqrt(gain + cost - (gain - cost) ** 2 / n) / n
    difference = (wins - losses) / len(pairs)
    interval = max(-1.0, centre - half), min(1.0, centre + half)
    return Paired(wins, losses, difference, interval, min(1.0, 2 * tail))
