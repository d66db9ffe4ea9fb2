"""Small policies on the fast path, and how far two action chunks are apart."""

import copy

import pytest
import torch

from driving import train_offsets, wrap

# Share of the range of the actions. Both paths are float32 and round in other places; 2e-7 was measured.
ROUNDING = 3e-6
FLOWS = ("pi0", "pi05", "tiny_smolvla")
PHASED = (*FLOWS, "act", "xvla", "pi0_fast", "groot", "evo1")


def apart(one, other):
    """Largest difference as a share of the range."""
    return float((one - other).abs().max() / (one.max() - one.min()))


def small(row, **options):
    """A small policy with these options of its configuration, and a batch."""
    policy = row.policy(2, **options)
    # ACT's biases and the statistics of its norms start at what makes no difference.
    for name, value in [*policy.named_parameters(), *policy.named_buffers()] * (row.policy_type == "act"):
        if name.endswith(("bias", "running_mean", "running_var")):
            value.data += 0.3 * torch.rand_like(value)
    return train_offsets(wrap(policy, 5)), row.batch(policy)


def copied(policy):
    """A deep copy, where LeRobot's class lets one be made."""
    try:
        return copy.deepcopy(policy)
    except AttributeError as error:
        if "local object" not in str(error):
            raise
        pytest.skip("LeRobot's class of this policy holds classes defined in functions, so no copy can be made")


def change_in_place(policy):
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if any(part in name for part in ("q_proj", "layernorm", "in_proj", "norm1")):
                weight.mul_(1.5)
