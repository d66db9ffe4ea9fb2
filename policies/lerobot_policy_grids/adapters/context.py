"""What coordinates may depend on besides the image, gathered from a policy's batch the same way for every family."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor


def present_cameras(cameras: Iterable[str], batch: Mapping[str, Any]) -> list[int]:
    """Numbers of the cameras in a batch, in the order in which LeRobot stacks their images."""
    return [number for number, key in enumerate(cameras) if key in batch]


def gather_context(
    condition_on: Iterable[str],
    batch: Mapping[str, Tensor],
    *,
    embed_language: Callable[[Tensor], Tensor],
    state_width: int,
    cameras: list[int],
) -> dict[str, Tensor]:
    """Build a sampler's context for the images of several cameras, stacked camera by camera.

    Args:
        condition_on: Which entries to build.
        batch: The policy's batch: token ids [b, l] with their mask, state [b, s] or [b, steps, s].
        embed_language: The policy's embedding of token ids, [b, l] to [b, l, c].
        state_width: The state is padded with zeros to this many dimensions.
        cameras: Number of each camera whose images are stacked.

    Returns:
        "language" [cameras * b, c], the mean of the instruction's tokens; "state" [cameras * b, state_width];
        "camera" int64 [cameras * b].
    """
    context: dict[str, Tensor] = {}
    tokens = batch[OBS_LANGUAGE_TOKENS]
    if "language" in condition_on:
        mask = batch[OBS_LANGUAGE_ATTENTION_MASK][..., None].float()
        context["language"] = (embed_language(tokens).float() * mask).sum(1) / mask.sum(1).clamp_min(1)
    if "state" in condition_on:
        state = batch[OBS_STATE]
        state = state[:, -1] if state.ndim > 2 else state
        context["state"] = torch.nn.functional.pad(state, (0, state_width - state.shape[-1]))
    context = {name: value.repeat(len(cameras), 1) for name, value in context.items()}
    if "camera" in condition_on:
        numbers = torch.tensor(cameras, device=tokens.device)
        context["camera"] = numbers.repeat_interleave(len(tokens))
    return context
