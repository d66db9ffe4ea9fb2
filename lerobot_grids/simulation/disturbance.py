"""What is executed instead of an expert's action, so that a demonstration shows how to recover."""

from dataclasses import dataclass, field

import numpy as np

# A push: how many steps it takes, its least and largest part along the table, and its part upwards.
STEPS, SIZES, UP = 3, (0.4, 1.0), 0.3


@dataclass
class Disturbance:
    """Gaussian noise, and now and then a push of the hand to a side and up.

    Args:
        random: Where both are drawn from.
        noise: Standard deviation of the noise on x, y and z.
        pushes: Share of the steps in which a push begins. Noise alone shows no way back from a few centimetres.
    """

    random: np.random.Generator
    noise: float
    pushes: float = 0.0
    left: int = field(default=0, init=False)

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """What is executed instead of an action [d], whose first three entries move the hand along x, y and z."""
        executed = action.copy()
        if not self.left and self.pushes and self.random.random() < self.pushes:
            angle, size = self.random.uniform(0, 2 * np.pi), self.random.uniform(*SIZES)
            self.left, self.push = STEPS, size * np.array([np.cos(angle), np.sin(angle), UP])
        if self.left:
            self.left -= 1
            executed[:3] = self.push
        executed[:3] += self.random.normal(0, self.noise, 3)
        clipped: np.ndarray = np.clip(executed, -1, 1)
        return clipped
