"""Find and convert the images in a batch."""

from typing import Any

import torch
from torch import Tensor


def is_image(value: Any) -> bool:
    """Whether an entry of a batch holds images [b, ..., c, h, w]."""
    return isinstance(value, Tensor) and value.ndim >= 4


def unit_images(batch: dict[str, Any]) -> dict[str, Any]:
    """Convert uint8 images of a batch to float32 in [0, 1]."""
    return {
        key: value.float() / 255 if is_image(value) and value.dtype == torch.uint8 else value
        for key, value in batch.items()
    }
