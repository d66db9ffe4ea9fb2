"""A prompt with images in it, whose visual tokens lie in front of its words here.

A trunk tells tokens apart by their positions and by what they see, and not by their order, so that nothing has to be
put in its place.
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def visibility(counts: list[int], images_before: Tensor, token_mask: Tensor) -> Tensor:
    """Which tokens see which, bool [b, p, p]: all that come before them in the prompt, without padding.

    Args:
        counts: Visual tokens of each camera.
        images_before: int64 [b, l], how many images are in front of each word.
        token_mask: bool [b, l], false for padding.
    """
    size = len(images_before)
    images = [images_before.new_full((size, count), 2 * camera + 1) for camera, count in enumerate(counts)]
    part = torch.cat([*images, 2 * images_before], dim=1)
    place = part * part.shape[1] + torch.arange(part.shape[1], device=part.device)
    real = F.pad(token_mask, (sum(counts), 0), value=True)
    return (place[:, None] <= place[:, :, None]) & real[:, None]
