"""Wrapping a policy and running it with every random draw fixed."""

import pytest
import torch

from lerobot_policy_grids import GridsConfig, GridsPolicy
from lerobot_policy_grids.modeling_grids import dense_policy
from lerobot_policy_grids.reducers import reducer_config

# One vision call for all cameras instead of one each: other batch sizes round differently in float32.
ROUNDING = 1e-5
# Of the policy's configuration; all other options are the reducer's.
POLICY_OPTIONS = ("position_ids", "schedule", "schedule_steps", "base_repo_id", "base_revision", "device", "version")


def config_of(base, reducer="grids", **options):
    """A grids configuration around a dense one; options of the policy and of the reducer."""
    own = {name: options.pop(name) for name in POLICY_OPTIONS if name in options}
    return GridsConfig(base=base, reducer=reducer_config(reducer, **options), **own)


def wrap(policy, k, reducer="grids", **options):
    """A grids policy of k tokens around a dense one, in evaluation mode."""
    if reducer != "blind":
        options["num_tokens"] = k
    wrapped = GridsPolicy(config_of(policy.config, reducer, **options), base=policy)
    return wrapped.eval()


def train_offsets(wrapped):
    """As after training: offsets and geometry are not zero."""
    torch.manual_seed(3)
    for parameter in wrapped.reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return wrapped


def act(policy, batch):
    """The action chunk, with every random draw fixed."""
    torch.manual_seed(4)
    policy.reset()
    return policy.predict_action_chunk(dict(batch))


def loss_of(policy, batch):
    """The training loss, with every random draw fixed."""
    torch.manual_seed(4)
    return policy.forward(dict(batch))[0]


def run(policy, batch):
    """(loss, action chunk, gradients of the base) with every random draw fixed."""
    policy.zero_grad()
    loss = loss_of(policy, batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in dense_policy(policy).named_parameters() if p.grad is not None}
    policy.zero_grad()
    return loss.detach(), act(policy, batch), gradients


def require_optional_cameras(family):
    """Skip a test of cameras that are missing, for a family that cannot do without any."""
    if family.needs_every_camera:
        pytest.skip("LeRobot's pre-processor refuses a batch without a camera, or writes another prompt")
