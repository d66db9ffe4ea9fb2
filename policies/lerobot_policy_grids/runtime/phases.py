"""What a policy does for one action chunk, in two phases: a prefill, and a denoising step that is repeated.

Most families take an `Observation` and leave a `Cache`. Others have NamedTuples of their own. A family that predicts
its actions in one pass has a single step, which does not read the noise.

Both are plain modules, functions of tensors alone. Their shapes follow from the batch, the cameras, K and the bucket of
the language's length. Nothing in them reads a value back to the CPU, so that they can be compiled, recorded as a
CUDA graph, exported and timed one by one.

Axes used in shapes: b batch, n cameras that sent an image, l language tokens, p tokens of the prefix, t actions of the
chunk, a action dimensions, h query heads, g key heads, d channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import GridsError


class UnavailableError(GridsError):
    """The two phases cannot stand for this policy as it is; its message says why."""


class Observation(NamedTuple):
    """What the prefill gets.

    Attributes:
        images: float32 [n * b, 3, height, width], prepared as the vision tower wants them, camera by camera.
        image_mask: bool [b, n], which images are real.
        tokens: int64 [b, l], the instruction.
        token_mask: bool [b, l], false for padding.
        state: float32 [b, s], the robot's state.
    """

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    state: Tensor


class Rotation(NamedTuple):
    """Tables of rotary position embeddings, broadcast to [b, t, heads, d]; see `layers.rotate`."""

    cos: Tensor
    sin: Tensor


class Cache(NamedTuple):
    """What the prefill leaves for the denoising steps. They change none of it, but for room that is left for them.

    Attributes:
        keys_values: For each layer of the action expert, keys and then values of the prefix, [b, 2 * g, p, d]. Where a
            step writes a token, p has room for all of them at its end.
        mask: Added to the scores of the chunk's tokens, broadcast to [b * g, 1, t, p + t]; 0 or hugely negative.
        rotation: Of the chunk's tokens.
        extra: What else does not change from step to step.
    """

    keys_values: tuple[Tensor, ...]
    mask: Tensor
    rotation: Rotation
    extra: tuple[Tensor, ...] = ()


def _noise(cache: Any, noise: Tensor) -> Tensor:
    return noise


@dataclass
class Phases:
    """The two phases of a policy, for fixed cameras, K and number of steps.

    They hold the policy's own modules, and tensors that were computed from its weights: after the weights changed, new
    phases must be built.

    Attributes:
        prefill: `prefill(*Observation) -> Cache`: vision tower, sampler and trunk.
        denoise_step: `denoise_step(cache, x_t, step) -> velocity`: x_t and the velocity float32 [b, t, a], step
            int64 [1], the number of a step; its time is 1 - step / steps. Some families predict the actions themselves.
        unused: Modules with weights that no phase reads.
        start: (Cache, noise) to what the steps begin with: the noise.
        vision: Names of the prefill's modules that are its vision tower. Copies of them in bfloat16 may take their
            place: the prefill gives them images of their precision, and goes on in the precision that there was.
    """

    prefill: nn.Module
    denoise_step: nn.Module
    unused: tuple[nn.Module, ...] = ()
    start: Callable[[Any, Tensor], Tensor] = _noise
    vision: tuple[str, ...] = ()
