"""The soak notices memory that grows and actions that get slower."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

import kept_results

soak = kept_results.load_script("soak")
OPTIONS = argparse.Namespace(clock="wall", seed=0, tokens=[2, 4], minutes=1.4, episode=4, rate=2)


class Time:
    """A clock on which only sleeping takes time."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Policy:
    """Acts at once, and may keep what it should not. It is also the process whose memory is read."""

    def __init__(self, leak_mib):
        self.leak_mib, self.memory_mib, self.num_tokens, self.budgets, self.resets = leak_mib, 100, 0, set(), 0
        state = PolicyFeature(FeatureType.STATE, (4,))
        self.config = SimpleNamespace(input_features={"observation.state": state})

    def memory_info(self):
        return SimpleNamespace(rss=self.memory_mib * soak.MIB)

    def warm_up(self, batch):
        self.budgets.add((batch["task"], self.num_tokens))

    def reset(self):
        self.resets += 1

    def select_action(self, batch):
        self.memory_mib += self.leak_mib
        return torch.zeros(1, 4)


def run(leak_mib, monkeypatch):
    loaded = SimpleNamespace(policy=Policy(leak_mib), preprocessor=dict, postprocessor=lambda action: action)
    # What an allocator keeps of earlier tests would hide the growth of a real one.
    monkeypatch.setattr(soak.psutil, "Process", lambda: loaded.policy)
    return loaded.policy, soak.act(loaded, OPTIONS)


def test_a_steady_policy_passes_and_a_leak_does_not(monkeypatch):
    monkeypatch.setattr(soak, "time", Time())
    policy, record = run(0, monkeypatch)
    result = soak.judge(record, max_growth_mib=8, max_drift=1e9)
    assert result["faults"] == []
    assert result["calls"] == 8 * result["episodes"]
    assert policy.resets == result["episodes"] == 21
    assert result["late"] == 0
    assert len(policy.budgets) == len(soak.TASKS) * 2
    _, record = run(1, monkeypatch)
    (fault,) = soak.judge(record, max_growth_mib=8, max_drift=1e9)["faults"]
    assert fault.startswith("memory grew by")


@pytest.mark.parametrize(("slower", "faults"), [(1.0, 0), (2.0, 1)])
def test_actions_that_get_slower_are_found(slower, faults):
    milliseconds = torch.linspace(1, slower, 1000).tolist()
    result = soak.judge(soak.Record(milliseconds, [100.0] * 20), max_growth_mib=8, max_drift=1.5)
    assert len(result["faults"]) == faults


def test_too_short_a_soak_says_so():
    with pytest.raises(ValueError, match="3 episodes; at least 10 are needed, so give more --minutes"):
        soak.judge(soak.Record([1.0] * 30, [100.0] * 3), 8, 1.5)
