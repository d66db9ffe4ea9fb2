"""What was computed from weights is not used with others."""

from contextlib import nullcontext

import pytest
import torch

from driving import act
from fast_path import ROUNDING, apart, change_in_place
from lerobot_policy_grids.runtime import fast
from lerobot_policy_grids.runtime.phases import Phases, UnavailableError
from lerobot_policy_grids.runtime.weights import Parking


def load_others(policy):
    policy.load_state_dict(
        {name: value * 1.2 if "proj" in name else value for name, value in policy.state_dict().items()}
    )


def replace_data(policy):
    for weight in policy.parameters():
        weight.data = weight.data * 1.1


def train_a_step(policy):
    policy.train()
    change_in_place(policy)
    policy.eval()


@pytest.mark.parametrize("change", [change_in_place, load_others, replace_data, train_a_step])
def test_weights_that_changed_are_noticed(phased, change):
    policy, batch = phased
    policy.use_runtime("fast")
    before = [act(policy, batch) for _ in range(2)][1]
    change(policy)
    after = [act(policy, batch) for _ in range(2)][1]
    policy.use_runtime("eager")
    expected = act(policy, batch)
    assert apart(expected, after) < ROUNDING
    assert apart(expected, before) > 10 * ROUNDING


def test_without_noticing_old_weights_would_act(pi0, monkeypatch):
    policy, batch = pi0
    policy.use_runtime("fast")
    act(policy, batch)
    monkeypatch.setattr(fast, "mark", lambda *modules: ())
    act(policy, batch)
    change_in_place(policy)
    found = act(policy, batch)
    policy.use_runtime("eager")
    assert apart(act(policy, batch), found) > 10 * ROUNDING


@pytest.mark.parametrize("is_merged", [False, True])
def test_low_rank_matrices_that_can_be_switched_off_are_not_recorded(is_merged):
    peft = pytest.importorskip("peft")
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), layers)
    if is_merged:
        layers[0].merge()
    with nullcontext() if is_merged else pytest.raises(UnavailableError, match="merge them"):
        fast._require_no_switches(Phases(torch.nn.Identity(), layers))


def test_a_parked_module_is_not_the_first_of_its_policy(pi0):
    policy, _ = pi0
    names = [name for name, _ in policy.named_parameters()]
    trunk, parking = policy.base.model.paligemma_with_expert, Parking()
    heads = (trunk.paligemma.lm_head, trunk.gemma_expert.lm_head)
    assert next(policy.parameters()) is heads[0].weight
    for head in heads:
        parking.park(head, [policy])
        assert head in parking
    assert all(next(policy.parameters()) is not head.weight for head in heads)
    assert sorted(name for name, _ in policy.named_parameters()) == sorted(names)
    parking.bring_back()
    assert [name for name, _ in policy.named_parameters()] == names
    assert heads[0] not in parking
