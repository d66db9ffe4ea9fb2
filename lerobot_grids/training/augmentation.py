"""Small random changes of the training data, against overfitting to lighting and robot state."""

from typing import Any

import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from ..data import is_image


def jitter_images(batch: dict[str, Any], strength: float) -> dict[str, Any]:
    """Change brightness and contrast of each image [b, ..., 3, h, w] in [0, 1]; strength 0 changes nothing."""
    if strength <= 0:
        return batch
    return {key: _jitter(value, strength) if is_image(value) else value for key, value in batch.items()}


def add_state_noise(prepared: dict[str, Any], deviation: float) -> dict[str, Any]:
    """Add Gaussian noise to the normalised robot state, if there is one; deviation 0 adds nothing."""
    if deviation <= 0 or OBS_STATE not in prepared:
        return prepared
    state = prepared[OBS_STATE]
    return prepared | {OBS_STATE: state + deviation * torch.randn_like(state)}


def _jitter(image: Tensor, strength: float) -> Tensor:
    shape = (len(image),) + (1,) * (image.ndim - 1)
    contrast = 1 + strength * (2 * torch.rand(shape, device=image.device) - 1)
    brightness = strength * (torch.rand(shape, device=image.device) - 0.5)
    return ((image - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)
