"""Around the fast path all is LeRobot's; each shape is checked once; what it does not follow is done eagerly."""

import pytest
import torch
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from driving import act, train_offsets, wrap
from fast_path import ROUNDING, apart, change_in_place, copied, small
from lerobot_policy_grids.runtime import buckets


def test_one_check_for_each_shape(flowing):
    policy, batch = flowing
    policy.use_runtime("fast")
    checked = policy.seam.runtime.differences
    language = "observation.language.tokens", "observation.language.attention_mask"

    def of_length(length):
        return {name: batch[name].repeat(1, 40)[:, :length] for name in language}

    for change, count in (
        ({}, 1),
        (of_length(7), 1),
        (of_length(16), 1),
        (of_length(17), 2),
        (of_length(32), 2),
        ({"observation.images.1": None}, 3),
    ):
        given = {name: value for name, value in (batch | change).items() if value is not None}
        act(policy, given)
        assert len(checked) == count, change
    policy.num_tokens = 3
    act(policy, batch)
    assert len(checked) == 4
    assert all(isinstance(found, float) for found in checked.values())


# Two in a bucket, and two in the next.
PROMPTS = {
    "groot": ("push a mug", "lift a cup", "lift a large cup", "open it"),
    "evo1": ("push a mug", "lift a cup", "lift a large cup and a small one", "open the uppermost drawer"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_another_prompt_of_a_bucket_costs_nothing(family_row, name):
    row = family_row(name)
    policy, batch = small(row)
    given = [row.changed(policy.base, batch, task=[task] * len(batch["action"])) for task in PROMPTS[name]]
    expected = [act(policy, prompt) for prompt in given]
    policy.use_runtime("fast")
    checked = policy.seam.runtime.differences
    for count, prompt, chunk in zip((1, 1, 2, 2), given, expected, strict=True):
        assert apart(chunk, act(policy, prompt)) < ROUNDING
        assert len(checked) == count
    assert apart(expected[0], expected[1]) > 10 * ROUNDING
    policy.num_tokens = 3
    act(policy, given[0])
    assert len(checked) == 3
    assert all(isinstance(found, float) for found in checked.values())


@pytest.mark.parametrize(("length", "size"), [(1, 16), (16, 16), (17, 32), (48, 48), (129, 200), (201, 256)])
def test_buckets(length, size):
    tokens = torch.arange(1, 301).expand(2, -1)
    mask = torch.arange(300).expand(2, -1) < torch.tensor([[length], [1]])
    cut, cut_mask = buckets.to_bucket(tokens, mask)
    assert cut.shape == cut_mask.shape == (2, size)
    assert torch.equal(cut[:, :length], tokens[:, :length])
    assert cut_mask.sum() == length + 1
    padded, _ = buckets.to_bucket(tokens[:, :length], mask[:, :length])
    assert padded.shape == (2, size)


def test_queues_and_noise_are_lerobots(phased):
    policy, batch = phased
    runs = {}
    for runtime in ("eager", "fast"):
        policy.use_runtime(runtime)
        policy.warm_up(batch)
        policy.reset()
        torch.manual_seed(5)
        steps = policy.config.n_action_steps + 2
        runs[runtime] = torch.stack([policy.select_action(dict(batch)) for _ in range(steps)])
    assert apart(runs["eager"], runs["fast"]) < ROUNDING


def test_warming_up_draws_nothing(pi0):
    policy, batch = pi0
    policy.use_runtime("fast")
    torch.manual_seed(6)
    expected = torch.rand(3)
    torch.manual_seed(6)
    policy.warm_up(batch)
    assert len(policy.seam.runtime.differences) == 1
    assert torch.equal(torch.rand(3), expected)


def test_real_time_chunking_guides_the_fast_velocities(flowing):
    policy, batch = flowing
    policy.config.rtc_config = RTCConfig(enabled=True, execution_horizon=4)
    policy.init_rtc_processor()
    left_over = torch.randn(len(batch["observation.state"]), 6, policy.base.config.max_action_dim)
    found = {}
    for runtime in ("eager", "fast"):
        policy.use_runtime(runtime)
        for _ in range(2):
            torch.manual_seed(4)
            found[runtime] = policy.predict_action_chunk(
                dict(batch), inference_delay=1, prev_chunk_left_over=left_over, execution_horizon=4
            )
    torch.manual_seed(4)
    free = policy.predict_action_chunk(dict(batch))
    assert isinstance(next(iter(policy.seam.runtime.differences.values())), float)
    assert apart(found["eager"], found["fast"]) < ROUNDING
    assert apart(free, found["fast"]) > 10 * ROUNDING


@pytest.mark.parametrize("name", ["groot", "evo1"])
def test_real_time_chunking_of_their_own_gets_the_fast_velocities(family_row, name):
    policy, batch = small(family_row(name))
    policy.base.config.rtc_config = RTCConfig(enabled=True, execution_horizon=4)
    if name == "evo1":
        policy.base.init_rtc_processor()
    left_over = torch.randn(len(batch["action"]), 6, 8)
    found = {}
    for runtime in ("eager", "fast"):
        policy.use_runtime(runtime)
        for _ in range(2):
            torch.manual_seed(4)
            chunk = policy.predict_action_chunk(dict(batch), inference_delay=1, prev_chunk_left_over=left_over)
            # LeRobot draws no other numbers afterwards.
            found[runtime] = torch.cat([chunk.flatten(), torch.rand(1)])
    assert isinstance(next(iter(policy.seam.runtime.differences.values())), float)
    assert apart(found["eager"], found["fast"]) < ROUNDING
    assert apart(act(policy, batch).flatten(), found["fast"][:-1]) > 0.1


@pytest.mark.parametrize("situation", ["dense position ids", "every token", "detached", "copied"])
def test_fast_path_in_other_situations(phased, family_row, situation):
    policy, batch = phased
    if situation == "dense position ids":
        policy = train_offsets(wrap(policy.detach(), 5, position_ids="dense"))
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    if situation == "every token":
        with policy.looking_everywhere():
            found = [act(policy, batch) for _ in range(2)][1]
            policy.use_runtime("eager")
            assert apart(act(policy, batch), found) < ROUNDING
        assert apart(expected, found) > 10 * ROUNDING
    elif situation == "detached":
        base = policy.detach()
        assert "sample_actions" not in vars(policy.family.model(base))
        act(base, batch)
    elif situation == "copied":
        twin = copied(policy)
        change_in_place(twin)
        assert apart(expected, [act(twin, batch) for _ in range(2)][1]) > 10 * ROUNDING
        assert apart(expected, act(policy, batch)) < ROUNDING
    else:
        assert apart(expected, act(policy, batch)) < ROUNDING


def test_a_watched_sampler_is_called(pi0, caplog):
    policy, batch = pi0
    seen = []
    policy.reducer.register_forward_hook(lambda *call: seen.append(call))
    policy.use_runtime("fast")
    for count in (2, 3):
        act(policy, batch)
        assert len(seen) == count
    policy.use_runtime("compiled")
    act(policy, batch)
    assert "a hook, which neither" in caplog.text


def test_what_the_fast_path_does_not_follow_is_done_eagerly(pi0, caplog):
    policy, batch = pi0
    policy.use_runtime("fast")
    policy.train()
    act(policy, batch)
    policy.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        act(policy, batch)
    assert not policy.seam.runtime.differences
    assert "it is being trained" in caplog.text
    assert "autocast is on" in caplog.text


def test_a_failure_to_build_is_said(pi0, monkeypatch, caplog):
    policy, batch = pi0
    expected = act(policy, batch)
    layer = next(module for module in policy.base.modules() if hasattr(module, "o_proj"))
    layer.q_proj.register_forward_hook(lambda module, inputs, output: output * 1.0)
    policy.use_runtime("fast")
    for _ in range(2):
        torch.testing.assert_close(act(policy, batch), expected)
    assert "only plain linear layers are joined" in caplog.text
