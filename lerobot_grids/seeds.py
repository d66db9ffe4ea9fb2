"""Seeds that depend on several numbers."""

import random


def seed_of(*parts: int) -> int:
    """A seed that depends on all parts, such as the run's seed, the step and the process."""
    return random.Random("/".join(str(part) for part in parts)).getrandbits(63)
