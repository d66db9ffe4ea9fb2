"""Whether two policies are the same, bit for bit."""

import torch

# Repository of the dense policy under the adapters of these tests.
BASE = "lab/dense"


def state_of(policy):
    return {name: value.clone() for name, value in policy.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


def act(policy):
    """An action chunk, all noise fixed."""
    torch.manual_seed(7)
    size = 96
    batch = {key: torch.rand(1, 3, size, size) for key in policy.config.image_features}
    batch |= {
        "observation.state": torch.randn(1, 4),
        "observation.language.tokens": torch.ones(1, 8, dtype=torch.long),
        "observation.language.attention_mask": torch.ones(1, 8, dtype=torch.bool),
    }
    policy.reset()
    with torch.no_grad():
        return policy.predict_action_chunk(batch)
