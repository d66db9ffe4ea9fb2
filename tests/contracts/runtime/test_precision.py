"""precision=bf16 computes the vision tower in bfloat16, and nothing else; where it cannot, it says so."""

import pytest
import torch

from driving import act, train_offsets, wrap
from fast_path import ROUNDING, apart, small
from lerobot_policy_grids.errors import UnsupportedPolicyError
from lerobot_policy_grids.runtime import fast, precision

# Small policies whose actions a rounded image hardly changes: whole tokens, and a trunk that reads few visual tokens.
ALIKE = ("pi0_fast", "groot", "evo1")


def outputs_of(policy, batch):
    """(Types of what the layers of the tower gave in a fast chunk, those of the layers behind it)."""
    (program,) = policy.seam.runtime.programs.values()
    prefill, found, handles = program.phases.prefill, ([], []), []
    tower = {layer for name in program.phases.vision for layer in prefill.get_submodule(name).modules()}
    for layer in {*prefill.modules(), *program.phases.denoise_step.modules()}:
        if next(layer.children(), None) is None and next(layer.parameters(), None) is not None:
            seen = found[layer not in tower]
            handles.append(
                layer.register_forward_hook(lambda layer, inputs, output, seen=seen: seen.append(output.dtype))
            )
    act(policy, batch)
    for handle in handles:
        handle.remove()
    return found


def test_bf16_computes_the_tower_in_bfloat16(phased):
    policy, batch = phased
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    expected = act(policy, batch)
    policy.use_runtime("fast", precision="bf16")
    act(policy, batch)
    inside, behind = outputs_of(policy, batch)
    assert set(inside) == {torch.bfloat16}
    assert set(behind) == {torch.float32}
    (found,) = policy.seam.runtime.differences.values()
    assert found < fast.BF16_BOUND / 2
    if policy.family.policy_type not in ALIKE:
        assert 10 * ROUNDING < apart(expected, act(policy, batch)) < fast.BF16_BOUND / 2
    after = policy.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    policy.use_runtime("fast")
    act(policy, batch)
    assert apart(expected, act(policy, batch)) < ROUNDING


def test_bf16_with_tokens_sampled_inside_the_tower(tower_family):
    policy = tower_family.policy(2)
    batch = tower_family.batch(policy)
    policy = train_offsets(wrap(policy, 4, sample_after_layer=1))
    expected = act(policy, batch)
    try:
        policy.use_runtime("fast", precision="bf16")
    except UnsupportedPolicyError:
        return
    act(policy, batch)
    inside, _ = outputs_of(policy, batch)
    assert set(inside) == {torch.bfloat16}
    assert tower_family.policy_type in ALIKE or apart(expected, act(policy, batch)) > 10 * ROUNDING
    (found,) = policy.seam.runtime.differences.values()
    assert found < fast.BF16_BOUND / 2


def test_a_wrong_copy_of_the_tower_is_found(pi0, monkeypatch, caplog):
    policy, batch = pi0
    expected = act(policy, batch)
    copied = precision.in_bfloat16

    def wrong(module, kept):
        twin = copied(module, kept)
        for weight in twin.parameters():
            weight.data = weight.data.roll(1, 0)
        return twin

    monkeypatch.setattr(precision, "in_bfloat16", wrong)
    policy.use_runtime("fast", precision="bf16")
    for _ in range(2):
        assert torch.equal(act(policy, batch), expected)
    assert "precision=bf16 is not used, the policy acts eagerly: its first action chunk differs" in caplog.text


@pytest.mark.parametrize("reason", ["name none", "a hook watches the vision tower"])
def test_a_tower_that_cannot_be_copied_says_so(family_row, reason, monkeypatch, caplog):
    if reason == "name none":
        monkeypatch.setattr("lerobot_policy_grids.families.pi.VISION", ())
    policy, batch = small(family_row("pi0"))
    expected = act(policy, batch)
    if reason != "name none":
        tower = policy.family.tower(policy.base)
        tower.encoder.layers[0].register_forward_hook(lambda *call: None)
    policy.use_runtime("fast", precision="bf16")
    assert torch.equal(act(policy, batch), expected)
    assert reason in caplog.text
    assert "give precision=tf32" in caplog.text


@pytest.mark.parametrize("name", ["pi0", "xvla"])
def test_a_hook_on_the_visual_tokens_is_followed(family_row, name, caplog):
    policy, batch = small(family_row(name))
    policy.use_runtime("fast")
    act(policy, batch)
    before = act(policy, batch)
    family = policy.family
    change = lambda module, inputs, output: family.change_features(policy.base, output, lambda tokens: tokens * 0.5)  # noqa: E731
    handle = family.feature_source(policy.base).register_forward_hook(change)
    changed = act(policy, batch)
    handle.remove()
    assert apart(before, changed) > 10 * ROUNDING
    assert "something watches the visual tokens" in caplog.text
    assert apart(before, act(policy, batch)) < ROUNDING
