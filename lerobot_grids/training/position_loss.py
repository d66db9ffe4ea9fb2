"""An auxiliary training loss: predict the positions of object and goal from the visual tokens.

The dataset has these positions if it was recorded in simulation. A small vision tower learns to localise much faster
with this loss than with the action loss alone. The loss is not part of the policy.
"""

from typing import Any

import torch
from torch import Tensor, nn


class PositionLoss(nn.Module):
    """L1 loss of positions that learned queries, two per task, read from the visual tokens.

    Args:
        width: C, channels of a visual token.
        statistics: "mean" and "std" of the dataset's positions, each [d].
        num_tasks: Number of tasks in the dataset; each has its own queries.
        num_heads: Number of attention heads.
    """

    # In metres. It limits the weight of coordinates that hardly vary.
    MIN_STD = 0.02

    def __init__(self, width: int, statistics: dict[str, Any], num_tasks: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        mean = torch.as_tensor(statistics["mean"]).float().flatten()
        std = torch.as_tensor(statistics["std"]).float().flatten().clamp_min(self.MIN_STD)
        self.mean: Tensor
        self.register_buffer("mean", mean)
        self.std: Tensor
        self.register_buffer("std", std)
        self.queries = nn.Parameter(torch.randn(num_tasks, 2, width) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.keys_values = nn.Linear(width, 2 * width)
        self.head = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, len(mean))
        )

    def forward(self, tokens: Tensor, positions: Tensor, task_index: Tensor) -> Tensor:
        """Mean absolute error of the predicted positions, in standard deviations.

        Args:
            tokens: [b, n, c], the visual tokens of all cameras.
            positions: [b, d], recorded positions in metres.
            task_index: int64 [b], task of each frame.
        """

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        keys, values = self.keys_values(self.norm(tokens)).chunk(2, dim=-1)
        read = nn.functional.scaled_dot_product_attention(heads(self.queries[task_index]), heads(keys), heads(values))
        predicted = self.head(read.transpose(1, 2).flatten(1))
        return (predicted - (positions - self.mean) / self.std).abs().mean()
