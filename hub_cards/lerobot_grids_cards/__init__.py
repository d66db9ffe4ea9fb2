"""What the Hub shows of a pushed policy: a model card of what is known and what was measured, nothing else.

`model_card.md` is the template; edit it, or give `push --template` another.
"""

from .card import PolicyFacts, render
from .measurements import DistanceRow, Measurements, SuccessRow, read_measurements

__all__ = ["DistanceRow", "Measurements", "PolicyFacts", "SuccessRow", "read_measurements", "render"]
