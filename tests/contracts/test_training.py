"""Training through the seam: gradients, precision, low-rank adapters, compilation."""

import pytest
import torch

from driving import ROUNDING, loss_of, train_offsets, wrap
from lerobot_grids.training.lora import add_lora, state_with_lora_added
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families import get_family


def test_gradients_reach_the_sampler_and_not_a_frozen_base(family):
    wrapped = train_offsets(wrap(family.policy(), 9))
    wrapped.base.requires_grad_(False)
    loss, _ = wrapped.forward(family.batch(wrapped.base))
    loss.backward()
    for name, parameter in wrapped.reducer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in wrapped.base.parameters())


def test_an_untrained_sampler_gets_a_gradient_through_its_coordinates(family):
    wrapped = wrap(family.policy(), 9)
    loss, _ = wrapped.forward(family.batch(wrapped.base))
    loss.backward()
    assert wrapped.reducer.query.weight.grad.abs().sum() > 0


def test_lerobots_optimiser_preset_takes_base_and_reducer(family):
    wrapped = wrap(family.policy(), 9)
    optimizer = wrapped.config.get_optimizer_preset().build(wrapped.get_optim_params())
    given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert {id(parameter) for parameter in wrapped.parameters() if parameter.requires_grad} == given


def test_gradient_checkpointing_changes_no_gradient(family):
    policy = family.policy(cameras=2)
    model = get_family(family.policy_type).model(policy)
    if not hasattr(model, "gradient_checkpointing_enable"):
        pytest.skip("LeRobot has no gradient checkpointing for this family")
    wrapped = train_offsets(wrap(policy, 9)).train()
    batch = family.batch(policy)
    results = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        looks = []
        handle = wrapped.reducer.register_forward_hook(lambda *args, looks=looks: looks.append(1))
        wrapped.zero_grad()
        loss_of(wrapped, batch).backward()
        handle.remove()
        assert len(looks) == 1  # recomputation must not sample again
        results.append({name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None})
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    assert "reducer.query.weight" in plain
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=ROUNDING, rtol=1e-4, msg=name)


def test_a_bfloat16_policy_keeps_float32_coordinates(family):
    policy = family.policy(**family.bfloat16)
    wrapped = train_offsets(wrap(policy, 9))
    seen = []
    wrapped.reducer.register_forward_hook(lambda m, i, output: seen.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = wrapped.forward(family.batch(policy))
        loss.backward()
        chunk = wrapped.predict_action_chunk(family.batch(policy))
    assert torch.isfinite(chunk).all()
    assert all(sampled.coordinates.dtype == torch.float32 for sampled in seen)
    assert wrapped.reducer.query.weight.grad.abs().sum() > 0


def test_low_rank_adapters_train_beside_the_reducer(family):
    """The recipe for small GPUs: a frozen base, in bfloat16 where the family has that, under autocast."""
    policy = family.policy()
    wrapped = train_offsets(wrap(policy, 9))
    names = list(policy.state_dict())
    halved = wrapped.family.to_bfloat16(policy)
    assert halved == bool(family.bfloat16)
    if policy._get_default_peft_targets() is None:
        with pytest.raises(GridsError, match="no LoRA targets"):
            add_lora(policy, rank=2)
        return
    add_lora(policy, rank=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = wrapped.forward(family.batch(policy))
    loss.backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert any(".lora_B." in name for name in trained)
    assert "reducer.query.weight" in trained
    assert all(".lora_" in name or name.startswith("reducer.") for name in trained)
    merged = state_with_lora_added(policy)
    assert list(merged) == names


def test_looking_compiles_without_a_graph_break(family):
    wrapped = train_offsets(wrap(family.policy(cameras=2), 9))
    batch = family.batch(wrapped.base)
    feature_map = torch.randn(2 * len(batch["action"]), *wrapped.reducer.token_grid, wrapped.reducer.width)
    context = {
        "language": torch.randn(len(feature_map), wrapped.family.layout(wrapped.base).language_width),
        "state": torch.randn(len(feature_map), wrapped.family.layout(wrapped.base).state_width),
        "camera": torch.zeros(len(feature_map), dtype=torch.int64),
    }
    torch._dynamo.reset()
    compiled = torch.compile(wrapped.reducer, backend="eager", fullgraph=True)
    expected, got = wrapped.reducer(feature_map, context), compiled(feature_map, context)
    torch.testing.assert_close(got.tokens, expected.tokens)
    torch.testing.assert_close(got.coordinates, expected.coordinates)


def test_the_seam_breaks_no_graph(family):
    """Where torch.compile gives up, it is in LeRobot's or transformers' code, as in the dense policy."""
    if family.reads_text:
        pytest.skip("no graph holds the prompt of this family")
    wrapped = train_offsets(wrap(family.policy(cameras=2), 9))
    torch._dynamo.reset()
    report = torch._dynamo.explain(getattr(wrapped.base, family.seam))(dict(family.batch(wrapped.base)))
    places = [reason.user_stack[-1].filename for reason in report.break_reasons]
    assert not [place for place in places if "lerobot_policy_grids" in place]
    if wrapped.base.config.type.startswith("pi0"):
        assert places == []
