"""The wrapper has what the base policy has, whatever LeRobot adds."""

from inspect import isfunction

import pytest
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import nn

from lerobot_policy_grids import GridsPolicy, compress, forwarding, versions
from lerobot_policy_grids.errors import GridsError


@pytest.fixture
def policy(grids_checkpoint):
    return GridsPolicy.from_pretrained(grids_checkpoint)


def public(kind):
    return {name for name in dir(kind) if not name.startswith("_")} - set(dir(nn.Module))


def test_the_public_surface_of_the_base_is_the_wrappers(policy):
    assert not [name for name in public(type(policy.base)) if not hasattr(policy, name)]
    methods = {n for n, member in vars(PreTrainedPolicy).items() if isfunction(member) and not n.startswith("_")}
    inherited = {name for name in methods if getattr(GridsPolicy, name) is getattr(PreTrainedPolicy, name)}
    # Whatever LeRobot's class defines is either decided here or the base's: its default would answer for the base.
    assert inherited <= forwarding.OWN


def test_a_method_of_a_release_to_come_reaches_the_base(policy, monkeypatch):
    monkeypatch.setattr(PreTrainedPolicy, "count_queued_actions", lambda self: -1, raising=False)
    monkeypatch.setattr(PreTrainedPolicy, "_layers_to_wrap", None, raising=False)
    monkeypatch.setattr(type(policy.base), "count_queued_actions", lambda self: 7, raising=False)
    monkeypatch.setattr(type(policy.base), "_layers_to_wrap", ["Block"], raising=False)

    class Wrapper(PreTrainedPolicy):
        config_class, name = GridsPolicy.config_class, "wrapper"
        forward = predict_action_chunk = select_action = get_optim_params = reset = None

    forwarding.forward_methods(Wrapper)
    forwarding.declare_as(Wrapper, type(policy.base))
    wrapper = Wrapper(policy.config)
    wrapper.require_attached = lambda: policy.base
    assert wrapper.count_queued_actions() == 7
    assert Wrapper._layers_to_wrap == ["Block"]


def test_attributes_that_only_the_base_has_are_reached(policy):
    policy.base.a_new_method = lambda: 3
    assert policy.a_new_method() == 3
    with pytest.raises(AttributeError):
        _ = policy.nobody_has_this
    with pytest.raises(AttributeError):
        _ = policy._private_of_nobody


@pytest.mark.skipif(not hasattr(PreTrainedPolicy, "drop_queued_actions"), reason="newer LeRobot has it")
def test_queued_actions_are_dropped(policy):
    policy.base._queues["action"].extend([torch.zeros(1, 4)] * 3)
    policy.drop_queued_actions()
    assert len(policy.base._queues["action"]) == 0


def test_compress_and_detach(dense_checkpoint):
    from lerobot.policies.factory import get_policy_class

    dense = get_policy_class("tiny_smolvla").from_pretrained(dense_checkpoint)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    batch = {
        "observation.image": torch.rand(1, 3, 96, 96),
        "observation.state": torch.zeros(1, 4),
        "observation.language.tokens": torch.ones(1, 8, dtype=torch.long),
        "observation.language.attention_mask": torch.ones(1, 8, dtype=torch.bool),
    }
    policy = compress(dense, num_tokens=9)
    assert policy.num_tokens == 9
    assert policy.predict_action_chunk(dict(batch)).shape[-1] == 4
    assert policy.detach() is dense
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    for act in (policy.predict_action_chunk, policy.select_action, policy.forward):
        with pytest.raises(GridsError, match=r"was detached from its base; use the base, or wrap it again"):
            act(dict(batch))
    assert compress(dense, 4, "pool").reducer.num_tokens == 4


def test_optimiser_parameters_keep_the_bases_form(policy, monkeypatch):
    """Some presets sort parameters by their names, others take groups."""
    base = policy.base
    reducer = {f"reducer.{name}" for name, p in policy.reducer.named_parameters() if p.requires_grad}
    named = {"vlm.weight": next(p for p in base.parameters() if p.requires_grad)}
    monkeypatch.setattr(base, "get_optim_params", lambda: dict(named))
    assert policy.get_optim_params().keys() == {"vlm.weight", *reducer}
    monkeypatch.setattr(base, "get_optim_params", lambda: [{"params": [named["vlm.weight"]], "lr": 1e-5}])
    groups = policy.get_optim_params()
    assert groups[0]["lr"] == 1e-5
    assert len(groups[1]["params"]) == len(reducer)
    monkeypatch.setattr(base, "get_optim_params", base.parameters)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert {id(p) for p in policy.get_optim_params()} == {id(p) for p in trained}


def test_an_unknown_lerobot_is_named_once_in_a_line(caplog, monkeypatch):
    versions.warn_of_unknown_lerobot()
    assert not caplog.messages
    monkeypatch.setattr(versions.lerobot, "__version__", "0.9.1")
    versions.warn_of_unknown_lerobot()
    (message,) = caplog.messages
    assert "this is 0.9.1" in message
    assert "\n" not in message
