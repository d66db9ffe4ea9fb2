"""What LeRobot's `eval()` does at each action happens where there is something to do, and costs nothing elsewhere."""

import pytest
import torch

from driving import act, wrap


@pytest.mark.parametrize("method", ["predict_action_chunk", "select_action"])
def test_an_action_ends_the_training_of_a_part_as_lerobots_does(family, method):
    dense = family.policy()
    batch = family.batch(dense)
    part = list(dense.modules())[-1]

    def is_trained_after(policy):
        part.train()
        policy.reset()
        getattr(policy, method)(dict(batch))
        return part.training

    expected = is_trained_after(dense)
    wrapped = wrap(dense, 5)
    assert is_trained_after(wrapped) == expected
    assert "eval" not in vars(dense)


def test_an_action_of_an_evaluated_policy_does_not_go_through_its_modules(family, monkeypatch):
    policy = wrap(family.policy(), 5)
    batch = family.batch(policy.base)
    act(policy, batch)
    calls, train = [], torch.nn.Module.train

    def counted(self, mode=True):
        calls.append(self)
        return train(self, mode)

    monkeypatch.setattr(torch.nn.Module, "train", counted)
    act(policy, batch)
    # LeRobot's X-VLA has another one in its loop.
    assert policy.base not in calls
    policy.base.eval()
    assert policy.base in calls
