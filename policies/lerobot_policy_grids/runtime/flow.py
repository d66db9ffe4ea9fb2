"""Flow matching at fixed times: everything that depends on the time alone is computed once for all steps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def step_times(steps: int, device: torch.device) -> Tensor:
    """Times float32 [steps] of the steps of an Euler integration from 1 (noise) to 0 (actions)."""
    return torch.tensor([1.0 + step * (-1.0 / steps) for step in range(steps)], dtype=torch.float32, device=device)


class NoisyActions(nn.Module):
    """Embed noisy actions together with their time: SiLU MLP of [projected actions, time].

    Args:
        project: Linear, actions to c channels.
        mlp_in: Linear, 2 * c to c channels.
        mlp_out: Linear, c to c channels.
        times: Embedded times [steps, c].
    """

    def __init__(self, project: nn.Linear, mlp_in: nn.Linear, mlp_out: nn.Linear, times: Tensor) -> None:
        super().__init__()
        self.project, self.mlp_out = project, mlp_out
        width = project.out_features
        # A product with [actions, time] is the sum of two, and the second is known for each step.
        self.weight: Tensor
        self.of_time: Tensor
        self.register_buffer("weight", mlp_in.weight.detach()[:, :width].t(), persistent=False)
        of_time = F.linear(times.to(mlp_in.weight.dtype), mlp_in.weight[:, width:], mlp_in.bias)
        self.register_buffer("of_time", of_time, persistent=False)

    def forward(self, x_t: Tensor, step: Tensor) -> Tensor:
        """Actions [b, t, a] at a step, int64 [1], to [b, t, c]."""
        actions = self.project(x_t)
        hidden = torch.addmm(self.of_time.index_select(0, step), actions.flatten(0, 1), self.weight)
        embedded: Tensor = self.mlp_out(F.silu(hidden))
        return embedded.view(actions.shape)


def integrate(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, numbers: Tensor) -> Tensor:
    """Euler integration of a velocity field from noise to actions.

    Args:
        velocity: (x_t [b, t, a], number of the step int64 [1]) to [b, t, a].
        noise: [b, t, a].
        numbers: int64 [steps], 0, 1, ...
    """
    x_t = noise
    for number in numbers.split(1):
        x_t = torch.add(x_t, velocity(x_t, number), alpha=-1.0 / len(numbers))
    return x_t


def integrate_forwards(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, numbers: Tensor) -> Tensor:
    """The same of a velocity field that leads from noise, at time 0, to actions."""
    actions = noise
    for number in numbers.split(1):
        actions = torch.add(actions, velocity(actions, number), alpha=1.0 / len(numbers))
    return actions
