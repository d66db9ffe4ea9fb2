"""Model cards for the Hub: known facts and measured results of a policy, nothing else.

`model_card.md` is the template; edit it, or give another with `push --template`.
"""

from .card import PolicyFacts, render
from .measurements import CostRow, Costs, DistanceRow, Measurements, SuccessRow, read_measurements

__all__ = [
    "CostRow",
    "Costs",
    "DistanceRow",
    "Measurements",
    "PolicyFacts",
    "SuccessRow",
    "read_measurements",
    "render",
]
