"""Training for few flow steps: the times that are drawn, and where one step should arrive."""

import copy

import pytest
import torch

from driving import act, loss_of, wrap
from lerobot_grids.training.distillation import SelfTeacher
from lerobot_grids.training.flow import OneStep, biased_time, flow_of
from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families.distances import action_distance


@pytest.mark.parametrize("bias", [1.0, 2.0, 4.0])
def test_biased_times_are_of_a_beta_distribution(flow_family, bias):
    policy = flow_family.policy()
    torch.manual_seed(0)
    with biased_time(policy, bias):
        times = policy.model.sample_time(20_000, torch.device("cpu"))
    assert "sample_time" not in vars(policy.model)
    # LeRobot's own draw is 0.999 * Beta(1.5, 1) + 0.001.
    a = 1.5 * bias
    assert times.mean().item() == pytest.approx(a / (a + 1), abs=0.01)
    for t in (0.25, 0.5, 0.75, 0.9):
        assert (times < t).float().mean().item() == pytest.approx(t**a, abs=0.012)
    assert times.max() <= 1
    if bias == 1.0:
        torch.manual_seed(0)
        assert torch.equal(times, policy.model.sample_time(20_000, torch.device("cpu")))


def test_the_loss_is_that_of_biased_times(flow_family):
    """The same draws of noise, and times that are powers of the policy's own."""
    policy = wrap(flow_family.policy(), 4)
    batch = flow_family.batch(policy.base)
    seen = []
    flow = flow_of(policy)
    plain = flow.sample_time
    loss = loss_of(policy, batch)
    with biased_time(policy, 3.0):
        biased = loss_of(policy, batch)
    flow.sample_time = lambda *args: seen.append(plain(*args)) or seen[-1] ** (1 / 3)
    assert torch.equal(loss_of(policy, batch), biased)
    assert not torch.equal(biased, loss)
    assert len(seen[0]) == len(batch["action"])


def test_one_step_should_arrive_where_the_teachers_steps_do(flow_family):
    policy = wrap(flow_family.policy(), 4)
    policy.base.requires_grad_(False)
    batch = flow_family.batch(policy.base)
    policy.train()
    for teacher in (None, SelfTeacher(policy)):
        one_step = OneStep(policy, teacher)
        torch.manual_seed(7)
        noise = one_step.flow.sample_noise((len(batch["action"]), *one_step.shape), torch.device("cpu"))
        before = copy.copy(vars(one_step.flow))
        torch.manual_seed(7)
        loss = one_step.loss(batch)
        assert vars(one_step.flow) == before
        assert policy.training
        assert policy.base.training
        # By LeRobot's action chunks: of one step with few tokens, and of all steps with few tokens or with all.
        config, field = policy.base.config, policy.family.stages(policy.base).steps_field
        count = getattr(config, field)
        assert count > 1
        with policy.looking_everywhere() if teacher else torch.no_grad():
            goal = act_from(policy, batch, noise)
        setattr(config, field, 1)
        end = act_from(policy, batch, noise)
        setattr(config, field, count)
        torch.testing.assert_close(loss, action_distance(end, goal, batch), atol=1e-5, rtol=1e-4)
        policy.train()
        loss.backward()
        assert policy.reducer.query.weight.grad.abs().sum() > 0
        policy.zero_grad()


def act_from(policy, batch, noise):
    policy.eval()
    policy.reset()
    with torch.no_grad():
        return policy.predict_action_chunk(dict(batch), noise=noise)


def test_a_dense_policy_learns_from_itself(flow_family):
    policy = flow_family.policy()
    batch = flow_family.batch(policy)
    chunk = act(policy, batch)
    OneStep(policy).loss(batch).backward()
    assert any(parameter.grad is not None for parameter in policy.parameters())
    assert torch.equal(act(policy, batch), chunk)


def test_one_step_already(flow_family):
    policy = flow_family.policy()
    setattr(policy.config, wrap(policy, 4).family.stages(policy).steps_field, 1)
    with pytest.raises(GridsError, match="takes one step already; drop it"):
        OneStep(policy)


def test_a_policy_without_a_flow_is_refused(flowless_family):
    policy = flowless_family.policy()
    with pytest.raises(UnsupportedPolicyError, match="has no flow whose time is drawn by a method; drop time_bias"):
        OneStep(policy)
