"""How far a student's prediction is from its teacher's."""

from collections.abc import Mapping

import torch
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK
from torch import Tensor, nn


def mean_where(error: Tensor, counts: Tensor) -> Tensor:
    """Mean of the entries that count, of which `counts` says 1 or true; 0 where none does."""
    return (error * counts).sum() / counts.sum().clamp_min(1)


def action_distance(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean squared distance of velocities or actions, over real action dimensions at steps within the episode.

    Args:
        student: [b, steps, max_action_dim].
        teacher: The same shape.
        batch: Holds the actions [b, steps, action_dim], and perhaps `action_is_pad` [b, steps].
    """
    size = batch[ACTION].shape[-1]
    error = (student[..., :size].float() - teacher[..., :size].float()).square().mean(-1)
    pad = batch.get("action_is_pad")
    inside = torch.ones_like(error) if pad is None else (~pad).to(error.dtype)
    return mean_where(error, inside)


def flat_action_distance(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """`action_distance` of velocities [b * steps, max_action_dim]."""
    size = (len(batch[ACTION]), -1)
    return action_distance(student.unflatten(0, size), teacher.unflatten(0, size), batch)


def token_divergence(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the teacher's distribution of each next action token to the student's.

    Args:
        student: Logits [b, tokens, vocabulary]; entry i predicts token i + 1.
        teacher: The same shape.
        batch: Holds bool [b, tokens], which tokens are real.
        temperature: Divides the logits; the loss is multiplied by its square (Hinton et al. 2015).
    """
    mask = batch[ACTION_TOKEN_MASK][:, 1:]
    # Only real tokens: a vocabulary of 257 152 entries is dear.
    ours = (student[:, :-1][mask].float() / temperature).log_softmax(-1)
    theirs = (teacher[:, :-1][mask].float() / temperature).log_softmax(-1)
    divergence = nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    return divergence * temperature**2 / max(1, len(ours))
