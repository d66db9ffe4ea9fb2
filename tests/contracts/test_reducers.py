"""Every way of having fewer visual tokens, in every family."""

import pytest
import torch

from driving import ROUNDING, act, loss_of, run, wrap
from lerobot_policy_grids.errors import BudgetError, UnsupportedPolicyError
from lerobot_policy_grids.reducers import ReducerConfig

CONFIGS = ReducerConfig.get_known_choices()
IN_TRUNK = [name for name, config in CONFIGS.items() if config.in_trunk]
BEFORE_TRUNK = [name for name in CONFIGS if name not in (*IN_TRUNK, "blind")]
IDENTICAL = [name for name in BEFORE_TRUNK if CONFIGS[name].dense_at_all_tokens]


@torch.no_grad()
@pytest.mark.parametrize("reducer", IDENTICAL)
def test_all_tokens_are_the_dense_policy(family, reducer):
    policy = family.policy(cameras=2)
    batch = family.batch(policy)
    loss, chunk = loss_of(policy, batch), act(policy, batch)
    wrapped = wrap(policy, family.tokens_per_camera, reducer=reducer)
    torch.testing.assert_close(loss_of(wrapped, batch), loss, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(act(wrapped, batch), chunk, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("reducer", BEFORE_TRUNK)
def test_the_trunk_gets_k_tokens_per_camera(family, reducer):
    policy = family.policy(cameras=2)
    batch = family.batch(policy)
    seen = family.lengths(policy)
    act(policy, batch)
    dense = seen[0]
    seen.clear()
    act(wrap(policy, 4, reducer=reducer), batch)
    assert seen[0] == dense - 2 * (family.tokens_per_camera - 4)


@pytest.mark.parametrize("reducer", IN_TRUNK)
def test_a_trunk_that_cannot_be_trained_so_has_no_loss(acting_family, reducer):
    policy = acting_family.policy()
    with pytest.raises(UnsupportedPolicyError, match="only when it acts"):
        wrap(policy, 4, reducer=reducer).forward(acting_family.batch(policy))


@pytest.mark.parametrize("reducer", IN_TRUNK)
def test_a_trunk_that_cannot_be_reached_is_refused(family, reducer):
    if not family.pruned:
        with pytest.raises(UnsupportedPolicyError, match=f"inside the trunk of the '{family.policy_type}'"):
            wrap(family.policy(), 4, reducer=reducer)
    else:
        assert wrap(family.policy(), 4, reducer=reducer).num_tokens == 4


@pytest.mark.parametrize("reducer", IN_TRUNK)
def test_all_tokens_in_the_trunk_act_as_the_dense_policy(pruned_family, reducer):
    policy = pruned_family.policy(cameras=2)
    batch = pruned_family.batch(policy)
    chunk = act(policy, batch)
    wrapped = wrap(policy, pruned_family.tokens_per_camera, reducer=reducer)
    torch.testing.assert_close(act(wrapped, batch), chunk, atol=ROUNDING, rtol=0)
    restored = wrapped.detach()
    assert torch.equal(act(restored, batch), chunk)


@pytest.mark.parametrize("reducer", IN_TRUNK)
def test_all_tokens_in_the_trunk_train_as_the_dense_policy(trained_family, reducer):
    policy = trained_family.policy(cameras=2)
    batch = trained_family.batch(policy)
    loss, _, gradients = run(policy, batch)
    loss_k, _, gradients_k = run(wrap(policy, trained_family.tokens_per_camera, reducer=reducer), batch)
    torch.testing.assert_close(loss_k, loss, atol=ROUNDING, rtol=0)
    assert gradients.keys() == gradients_k.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_k[name], gradient, atol=ROUNDING, rtol=0, msg=name)


@pytest.mark.parametrize("cameras", [1, 2])
def test_dropping_in_an_acting_trunk_is_masking_in_it(acting_family, cameras):
    """What is dropped after the first layers could as well have stayed, with nothing attending to it."""
    policy = acting_family.policy(cameras)
    batch = acting_family.batch(policy)
    wrapped = wrap(policy, 5, reducer="fastv")
    chosen = []
    wrapped.reducer.register_forward_hook(lambda module, inputs, output: chosen.append(output.places))
    chunk = act(wrapped, batch)
    (kept,) = chosen
    policy = wrapped.detach()
    dropped = torch.ones(len(kept), cameras * acting_family.tokens_per_camera, dtype=torch.bool).scatter(1, kept, False)
    model = policy.model.paligemma_with_expert

    def mask(layer, args, kwargs):
        columns = torch.zeros(len(dropped), kwargs["attention_mask"].shape[-1], dtype=torch.bool)
        columns[:, : dropped.shape[1]] = dropped
        kwargs["attention_mask"] = kwargs["attention_mask"].masked_fill(columns[:, None, None], -2.0e38)
        return args, kwargs

    for layers in (model.paligemma.model.language_model.layers, model.gemma_expert.model.layers):
        for layer in layers[max(1, min(2, len(layers) // 2)) :]:
            layer.register_forward_pre_hook(mask, with_kwargs=True)
    torch.testing.assert_close(act(policy, batch), chunk, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("cameras", [1, 2])
def test_dropping_in_the_trunk_is_masking_in_the_trunk(trained_family, cameras, special_tokens):
    """What is dropped after the first layers could as well have stayed, with nothing attending to it."""
    policy = trained_family.policy(cameras, add_image_special_tokens=special_tokens)
    batch = trained_family.batch(policy)
    wrapped = wrap(policy, 5, reducer="fastv")
    chosen = []
    wrapped.reducer.register_forward_hook(lambda module, inputs, output: chosen.append(output.places))
    loss, chunk, _ = run(wrapped, batch)
    for_loss, for_chunk = chosen
    assert for_loss.shape == (len(batch["action"]), 5 * cameras)
    policy = wrapped.detach()
    pruning = policy.model.vlm_with_expert
    n = cameras * trained_family.tokens_per_camera
    before, after = (2, 1) if special_tokens else (0, 0)
    length = trained_family.tokens_per_camera + before + after
    places = torch.tensor([camera * length + before + i for camera in range(cameras) for i in range(n // cameras)])
    assert len(policy.model.global_image_start_token) == 2

    def masked(kept):
        dropped = torch.ones(len(kept), n, dtype=torch.bool).scatter(1, kept, False)

        def layer(name):
            def forward(layers, states, index, positions, mask, *args, **kwargs):
                if index >= 1:
                    columns = torch.zeros(len(mask), mask.shape[-1], dtype=torch.bool)
                    columns[:, places] = dropped
                    mask = mask & ~columns[:, None]
                return getattr(type(pruning), name)(pruning, layers, states, index, positions, mask, *args, **kwargs)

            return forward

        for name in ("forward_attn_layer", "forward_cross_attn_layer"):
            setattr(pruning, name, layer(name))

    masked(for_loss)
    torch.testing.assert_close(loss_of(policy, batch), loss, atol=ROUNDING, rtol=0)
    masked(for_chunk)
    torch.testing.assert_close(act(policy, batch), chunk, atol=ROUNDING, rtol=0)


def test_denoising_steps_do_not_lengthen_the_cache(trained_family):
    policy = trained_family.policy(num_steps=4)
    batch = trained_family.batch(policy)
    wrapped = wrap(policy, 5, reducer="fastv")
    vlm, lengths = policy.model.vlm_with_expert, []
    inner = vlm.forward

    def forward(*args, **kwargs):
        result = inner(*args, **kwargs)
        cache = result[1]
        if isinstance(cache, dict):  # LeRobot 0.6.0
            lengths.append([cache[layer]["key_states"].shape[1] for layer in sorted(cache)])
        else:
            lengths.append([layer.get_seq_length() for layer in cache.layers])
        return result

    vlm.forward = forward
    act(wrapped, batch)
    prefix, *steps = lengths
    assert prefix[0] - prefix[1] == trained_family.tokens_per_camera - 5
    assert len(steps) == 4
    assert all(after[1] == prefix[1] for after in steps)


def test_layers_that_see_everything_must_leave_some(pruned_family):
    with pytest.raises(BudgetError, match=r"full_layers=\d, but the trunk has \d layers; choose 1 \.\. \d"):
        wrap(pruned_family.policy(), 5, reducer="fastv", full_layers=8)
