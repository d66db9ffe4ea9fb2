"""Before a policy is trained, its sampler alone learns to look where the teacher looks.

The points of a new sampler lie on a lattice, whatever the image shows. A trunk that is trained with them learns to do
without what they miss, and the action loss hardly says where they should be. The teacher knows, see `saliency`. While
nothing else is trained, neither that nor the feature maps change. So both are computed once, for some frames, and then
a training step takes milliseconds.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import psutil
import torch
from torch import Tensor

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.errors import GridsError

from ..console import counting_bar
from .distillation import Distillation
from .optimisation import warmup_cosine
from .saliency import distance_to_points

RATE, WARMUP = 3e-3, 0.1
# The sampler takes so many steps, and sees no frame more often than this.
STEPS, PASSES = 1600, 25
# The share of the free memory that feature maps may take.
SHARE = 0.5


@dataclass
class Looks:
    """What a sampler is asked in one batch, on the CPU, and where the teacher looks in it.

    Attributes:
        asked: Feature maps [b, h, w, c], context and number of each camera.
        saliency: float32 [b, cameras, n].
    """

    asked: list[tuple[Tensor, dict[str, Tensor], int]]
    saliency: Tensor

    @property
    def size(self) -> int:
        """Bytes of the feature maps."""
        return sum(maps.nbytes for maps, _, _ in self.asked)


def learn_to_look(
    distillation: Distillation, batches: Iterator[dict[str, Any]], count: int, follow_schedule: Callable[[float], Any]
) -> None:
    """Train the sampler of a policy on `count` batches, and print how far its points are from where the teacher looks.

    Args:
        distillation: Policy and teacher.
        batches: Batches of the policy.
        count: How many of them are used.
        follow_schedule: Sets the budget of the policy for a share of the training, from 0 to below 1.

    Raises:
        GridsError: If their feature maps do not fit into memory.
    """
    policy = distillation.policy
    looks: list[Looks] = []
    with counting_bar("finding where the teacher looks", count, "batches") as bar:
        for batch in islice(batches, count):
            looks.append(look(distillation, batch))
            if len(looks) == 1:
                require_memory(looks[0], count)
            bar.advance()

    def cells_off() -> float:
        follow_schedule(0.0)
        with torch.no_grad():
            return math.sqrt(sum(float(distance(policy, some)) for some in looks) / len(looks))

    before = cells_off()
    weights = [weight for weight in policy.reducer.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, RATE, betas=(0.9, 0.95), weight_decay=0.01)
    steps = min(STEPS, PASSES * len(looks))
    scheduler = warmup_cosine(optimizer, round(WARMUP * steps), steps)
    with counting_bar("learning to look there", steps, "steps") as bar:
        for step in range(steps):
            follow_schedule(step / steps)
            # Distributed strategies wait for the gradients of a backward pass, so none is run.
            loss = distance(policy, looks[int(torch.randint(len(looks), ()))])
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            bar.advance()
    print(
        f"the nearest point is {cells_off():.2f} cells from where the teacher looks, {before:.2f} without learning",
        file=sys.stderr,
    )


@torch.no_grad()
def look(distillation: Distillation, batch: dict[str, Any]) -> Looks:
    """What the sampler of a policy is asked in a batch, and where the teacher looks in it."""
    policy, calls = distillation.policy, []
    handle = policy.reducer.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    try:
        teacher = distillation.predict(batch, salient=True)[-1]
    finally:
        handle.remove()
    assert teacher.saliency is not None
    size = len(teacher.saliency)
    cameras = iter(policy.seam.cameras_of(batch))
    asked = [
        (
            maps[part : part + size].to("cpu", torch.bfloat16),
            {name: value[part : part + size].cpu() for name, value in context.items()},
            next(cameras),
        )
        for maps, context, *_ in calls
        for part in range(0, len(maps), size)
    ]
    return Looks(asked, teacher.saliency.cpu())


def distance(policy: GridsPolicy, looks: Looks) -> Tensor:
    """Squared distance in cells from salient cells to the nearest point with the policy's budget, a scalar."""
    reducer: Any = policy.reducer
    device = next(reducer.parameters()).device
    coordinates = []
    for maps, context, camera in looks.asked:
        told = {name: value.to(device) for name, value in context.items()}
        # Not a call of the module, whose hooks are for training steps.
        found = reducer.reduce(maps.to(device), told, reducer.tokens_of(camera), reducer.region_of(camera))
        coordinates.append(found.coordinates)
    return distance_to_points(looks.saliency.to(device), coordinates, policy.seam.layout.token_grid)


def require_memory(looks: Looks, count: int) -> None:
    """Raise `GridsError` unless feature maps of `count` such batches fit into memory."""
    size, frames, free = looks.size, len(looks.saliency), psutil.virtual_memory().available
    if size * count > SHARE * free:
        raise GridsError(
            f"look_first={count * frames}: feature maps of so many frames take {size * count / 2**30:.1f} GiB of "
            f"{free / 2**30:.1f} GiB of free memory; give at most {int(SHARE * free / size) * frames}"
        )
