"""What works on this machine, and what would with a policy and a dataset: one line each, with what to do.

Nothing heavy is imported here: the machine may lack it, and the doctor should say so.
"""

from .check import Check, run_checks
from .environment import MACHINE
from .plan import plan_checks

__all__ = ["MACHINE", "Check", "plan_checks", "run_checks"]
