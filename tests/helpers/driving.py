"""Wrapping a policy and running it with every random draw fixed."""

import torch

from lerobot_policy_grids import GridsConfig, GridsPolicy

# One vision call for all cameras instead of one each: other batch sizes round differently in float32.
ROUNDING = 1e-5


def wrap(policy, k, **options):
    """A grids policy of k tokens around a dense one, in evaluation mode."""
    config = GridsConfig(base=policy.config, num_tokens=k, **options)
    wrapped = GridsPolicy(config, base=policy)
    return wrapped.eval()


def train_offsets(wrapped):
    """As after training: offsets and geometry are not zero."""
    torch.manual_seed(3)
    for parameter in wrapped.reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return wrapped


def base_of(policy):
    """The dense policy, wrapped or not."""
    return policy.base if isinstance(policy, GridsPolicy) else policy


def act(policy, family, batch):
    """The action chunk, with every random draw fixed."""
    torch.manual_seed(4)
    _, options = family.fix_noise(base_of(policy))
    return policy.predict_action_chunk(dict(batch), **options)


def run(policy, family, batch):
    """(loss, action chunk, gradients of the base) with every random draw fixed."""
    torch.manual_seed(4)
    options, _ = family.fix_noise(base_of(policy))
    policy.zero_grad()
    loss, _ = policy.forward(dict(batch), **options)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in base_of(policy).named_parameters() if p.grad is not None}
    policy.zero_grad()
    return loss.detach(), act(policy, family, batch), gradients
