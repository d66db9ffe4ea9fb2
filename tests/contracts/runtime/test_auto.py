"""runtime=auto, the default: fast where a GPU launches kernels and the policy can, LeRobot's own loop elsewhere."""

from contextlib import nullcontext

import pytest
import torch

from driving import act, train_offsets, wrap
from fast_path import ROUNDING, apart, copied, small
from lerobot_grids.looks.points import look
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
    assert "runtime=auto: 2 cameras" in capsys.readouterr().err
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


@pytest.mark.parametrize("reason", ["autocast", "training"])
def test_what_the_fast_path_does_not_follow_is_done_eagerly_in_silence(family_row, reason, pays, caplog):
    policy, batch = small(family_row("pi0"))
    if reason == "training":
        policy.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast"):
        act(policy, batch)
    assert policy.seam.runtime is None
    assert not said(caplog)


def test_hooks_are_called_on_all_modules_that_act(phased, pays, caplog):
    policy, batch = phased
    act(policy, batch)
    act(policy, batch)
    calls: dict[str, list[int]] = {"eager": [], "auto": []}
    for seen, acting in ((calls["eager"], policy.acting_eagerly()), (calls["auto"], nullcontext())):
        modules = list(policy.base.modules())
        handles = [
            module.register_forward_pre_hook(lambda *call, number=number, seen=seen: seen.append(number))
            for number, module in enumerate(modules)
        ]
        with acting:
            act(policy, batch)
        for handle in handles:
            handle.remove()
    assert calls["eager"]
    assert calls["auto"] == calls["eager"]
    assert not said(caplog)
    assert policy.acts_fast()


def test_it_can_be_looked_at_after_it_acted(phased, pays):
    policy, batch = phased
    expected = look(policy, batch)
    act(policy, batch)
    found = look(policy, batch)
    assert policy.acts_fast()
    assert expected
    for camera, points in expected.items():
        for one, two in zip(points, found[camera], strict=True):
            assert (one.coordinates == two.coordinates).all()


@pytest.mark.parametrize("way", ["moved", "copied"])
def test_what_was_parked_comes_back_with_the_rest(phased, pays, way):
    policy, batch = phased
    names = [name for name, _ in policy.named_parameters()]
    act(policy, batch)
    (program,) = policy.seam.runtime.programs.values()
    for module in program.phases.unused:
        policy.seam.runtime._parked.park(module, [policy])
    if way == "moved":
        policy.to(torch.float64)
    else:
        policy = copied(policy)
        policy.train()
    assert [name for name, _ in policy.named_parameters()] == names
    assert not policy.seam.runtime.programs


def test_flops_are_those_of_the_eager_path(family_row, pays):
    policy, batch = small(family_row("pi0"))
    found = [count_flops(policy, batch) for _ in range(2)]
    act(policy, batch)
    assert policy.acts_fast()
    found.append(count_flops(policy, batch))
    policy.use_runtime("eager")
    assert found == [count_flops(policy, batch)] * 3
