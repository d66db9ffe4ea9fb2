"""runtime=auto, the default: fast where a GPU launches kernels and the policy can, LeRobot's own loop elsewhere."""

import pytest
import torch

from driving import act, train_offsets, wrap
from fast_path import ROUNDING, apart, small
from lerobot_grids.profiling.measure import count_flops
from lerobot_policy_grids import modeling_grids


@pytest.fixture
def pays(monkeypatch):
    """As if the policies were on a GPU, but without graphs."""
    monkeypatch.setattr(modeling_grids, "_pays", lambda device: True)


def said(caplog):
    """What this project logged."""
    return [record for record in caplog.records if record.name.startswith("lerobot_policy_grids")]


def test_on_a_cpu_it_is_lerobots_loop(phased):
    policy, batch = phased
    assert policy.config.runtime == "auto"
    found = act(policy, batch)
    assert policy.seam.runtime is None
    policy.use_runtime("eager")
    assert torch.equal(act(policy, batch), found)


def test_where_it_pays_it_is_fast(phased, pays, capsys):
    policy, batch = phased
    with policy.acting_eagerly():
        expected = act(policy, batch)
    assert policy.seam.runtime is None
    found = [act(policy, batch) for _ in range(2)][1]
    assert "runtime=fast: 2 cameras" in capsys.readouterr().err
    (program,) = policy.seam.runtime.programs.values()
    assert program is not None
    assert apart(expected, found) < ROUNDING
    with policy.acting_eagerly():
        assert torch.equal(act(policy, batch), expected)
    base = policy.detach()
    assert torch.isfinite(act(base, batch)).all()


def test_a_policy_without_phases_acts_eagerly_and_says_nothing(family, pays, caplog, capsys):
    policy = train_offsets(wrap(family.policy(), 5))
    batch = family.batch(policy.base)
    found = [act(policy, batch) for _ in range(2)][1]
    runtime = policy.seam.runtime
    policy.use_runtime("eager")
    expected = act(policy, batch)
    assert not said(caplog)
    if runtime is None:
        assert torch.equal(found, expected)
        assert "runtime=" not in capsys.readouterr().err


@pytest.mark.parametrize("reason", ["a hook", "autocast", "training"])
def test_what_the_fast_path_does_not_follow_is_done_eagerly_in_silence(family_row, reason, pays, caplog):
    policy, batch = small(family_row("pi0"))
    source, seen = policy.family.feature_source(policy.base), []
    if reason == "a hook":
        source.register_forward_hook(lambda *call: seen.append(call))
    if reason == "training":
        policy.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast"):
        act(policy, batch)
    assert policy.seam.runtime is None
    assert not said(caplog)
    assert len(seen) == (reason == "a hook")


def test_flops_are_those_of_the_eager_path(family_row, pays):
    policy, batch = small(family_row("pi0"))
    found = [count_flops(policy, batch) for _ in range(2)]
    act(policy, batch)
    assert policy.acts_fast()
    found.append(count_flops(policy, batch))
    policy.use_runtime("eager")
    assert found == [count_flops(policy, batch)] * 3
