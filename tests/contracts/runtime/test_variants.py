"""The fast path acts as the slow one for every option of a family and every reducer before the trunk."""

import pytest
import torch

from driving import act, train_offsets, wrap
from fast_path import ROUNDING, apart, small
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.runtime import fast

VARIANTS = {
    "special tokens": {"add_image_special_tokens": True},
    "layers that all attend to the actions": {"attention_mode": "self_attn"},
    "layers that attend to the prefix alone": {"self_attn_every_n_layers": 0},
    "fewer layers in the expert": {"num_expert_layers": 1},
    "half precision in the trunk": {},
    "a masked image": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_one_family(family_row, variant):
    row = family_row("tiny_smolvla")
    base = row.policy(2, **VARIANTS[variant])
    policy, batch, bound = train_offsets(wrap(base, 5)), row.batch(base), ROUNDING
    if variant == "half precision in the trunk":
        base.model.vlm_with_expert.vlm.to(torch.bfloat16)
        bound = fast.BOUNDS[torch.bfloat16] / 2
    if variant == "a masked image":
        unmasked = act(policy, batch)
        batch["observation.images.1_padding_mask"] = torch.tensor([True, False, True])
        assert apart(unmasked, act(policy, batch)) > 10 * ROUNDING
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    assert all(isinstance(found, float) for found in policy.seam.runtime.differences.values())
    assert apart(expected, act(policy, batch)) < bound


VARIANTS_OF_XVLA = {
    "an empty view": {"num_image_views": 3},
    "projections of each kind of robot": {"use_hetero_proj": True},
    "positions of the first tokens": {},
    "no state": {"use_proprio": False},
    "one layer": {"depth": 1},
    "one step": {"num_denoising_steps": 1},
    "a gripper": {"action_mode": "joint", "max_state_dim": 14},
    "half precision": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("variant", ["draws", "an end", "half precision", "dense position ids"])
def test_variants_of_pi0_fast(family_row, variant, monkeypatch):
    row = family_row("pi0_fast")
    base = row.policy(2, temperature=0.7 if variant == "draws" else 0.0, max_decoding_steps=9)
    options = {"position_ids": "dense"} if variant == "dense position ids" else {}
    policy, batch = train_offsets(wrap(base, 5, **options)), row.batch(base)
    written, decode = [], base.model.sample_actions_fast_kv_cache
    monkeypatch.setattr(base, "detokenize_actions", lambda tokens, **shape: written.append(tokens) or tokens * 1.0)
    if variant == "half precision":
        base.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    assert decode.__func__ is type(base.model).sample_actions_fast_kv_cache
    act(policy, batch)
    if variant == "an end":
        # A token that it did not write before.
        batch = {name: value[:1] for name, value in batch.items()}
        row = written[0][0].tolist()
        stop = next(place for place in range(1, 9) if row[place] not in row[:place])
        tokenizer = base.model._paligemma_tokenizer
        monkeypatch.setattr(tokenizer, "convert_tokens_to_ids", lambda word: row[stop], raising=False)
        written.clear()
        act(policy, batch)
        assert written[0][0, stop] == row[stop]
        assert not written[0][0, stop + 1 :].any()
    policy.use_runtime("fast")
    after = []
    for _ in range(2):
        act(policy, batch)
        after.append(torch.rand(1))
    (found,) = policy.seam.runtime.differences.values()
    # In half precision rounding decides between tokens; what the slow path wrote must still be nearly the likeliest.
    assert found < fast.BOUNDS[torch.bfloat16] if variant == "half precision" else found == 0
    assert torch.equal(written[0], written[1])
    assert variant == "half precision" or torch.equal(written[0], written[2])
    assert torch.equal(*after)
    assert (written[0] != 0).sum() > 1


@pytest.mark.parametrize("variant", VARIANTS_OF_XVLA)
def test_variants_of_xvla(family_row, variant):
    row = family_row("xvla")
    base = row.policy(2, **VARIANTS_OF_XVLA[variant])
    options = {"position_ids": "consecutive"} if variant == "positions of the first tokens" else {}
    policy, batch = train_offsets(wrap(base, 5, **options)), row.batch(base) | {"domain_id": torch.tensor([1, 0, 1])}
    other = batch | {"domain_id": torch.tensor([0, 0, 0])}
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    (found,) = policy.seam.runtime.differences.values()
    bound = fast.BOUNDS[torch.bfloat16] / 2 if variant == "half precision" else ROUNDING
    assert found < bound
    assert apart(expected, act(policy, batch)) < bound
    assert apart(expected, act(policy, other)) > 10 * ROUNDING


VARIANTS_OF_GROOT = {
    "positions of the first tokens": ({}, {"position_ids": "consecutive"}),
    "a camera with fewer tokens": ({}, {"camera_tokens": {"observation.images.1": 2}}),
    "prompts of different lengths": ({}, {}),
    "half precision": ({"model_params_fp32": False}, {}),
    "half precision under autocast": ({"model_params_fp32": False, "use_bf16": True}, {}),
    "half precision by autocast alone": ({"use_bf16": True}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS_OF_GROOT)
def test_variants_of_groot(family_row, variant):
    row, (options, others) = family_row("groot"), VARIANTS_OF_GROOT[variant]
    policy, batch = small(row, **options)
    policy = train_offsets(wrap(policy.detach(), 5, **others))
    if variant == "prompts of different lengths":
        batch = row.changed(policy.base, batch, task=["push", "lift a large cup", "open it"])
        assert not batch["attention_mask"].all()
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    (found,) = policy.seam.runtime.differences.values()
    bound = fast.BOUNDS[torch.bfloat16] / 2 if options else ROUNDING
    assert found < bound
    assert apart(expected, act(policy, batch)) < bound


VARIANTS_OF_EVO1 = {
    "a camera that is missing": ({}, {}),
    "a camera that is missing, and dense position ids": ({}, {"position_ids": "dense"}),
    "a camera with fewer tokens": ({}, {"camera_tokens": {"observation.images.1": 2}}),
    "the last word alone": ({"return_cls_only": True}, {}),
    "several kinds of robots": ({"num_categories": 3}, {}),
    "one action": ({"chunk_size": 1, "n_action_steps": 1}, {}),
    "padding in front of the words": ({}, {}),
    "an instruction that is cut": ({"max_text_length": 44}, {}),
    "half precision": ({"vlm_dtype": "bfloat16"}, {}),
    "half precision by autocast": ({}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS_OF_EVO1)
def test_variants_of_evo1(family_row, variant, monkeypatch):
    row, (options, others) = family_row("evo1"), VARIANTS_OF_EVO1[variant]
    policy, batch = small(row, **options)
    policy = train_offsets(wrap(policy.detach(), 5, **others))
    other = row.changed(policy.base, batch, task=["push", "pick up a cup", "open the drawer now"])
    if variant.startswith("a camera that is missing"):
        batch, other = ({n: v for n, v in given.items() if n != "observation.images.1"} for given in (batch, other))
    elif variant == "several kinds of robots":
        batch = batch | {"embodiment_id": torch.tensor([2, 0, 1])}
        other = batch | {"embodiment_id": torch.tensor([2, 0, 0])}
    elif variant == "padding in front of the words":
        policy.base.model.embedder.tokenizer.padding_side = "left"
    elif variant == "half precision by autocast":
        base = type(policy.base)
        monkeypatch.setattr(base, "_amp_enabled", True)
        monkeypatch.setattr(base, "_maybe_autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    (found,) = policy.seam.runtime.differences.values()
    bound = fast.BOUNDS[torch.bfloat16] / 2 if variant.startswith("half precision") else ROUNDING
    assert found < bound
    assert apart(expected, act(policy, batch)) < bound
    if bound == ROUNDING:
        assert apart(expected, act(policy, other)) > 10 * ROUNDING


def test_what_lerobot_refuses_of_evo1_is_refused(family_row):
    policy, batch = small(family_row("evo1"), num_categories=3)
    policy.use_runtime("fast")
    act(policy, batch)
    with pytest.raises(ValueError, match="embodiment ids must be in"):
        act(policy, batch | {"embodiment_id": torch.tensor([0, 3, 0])})
    with pytest.raises(GridsError, match="an instruction holds '<IMG_CONTEXT>'"):
        act(policy, batch | {"task": ["push", "<IMG_CONTEXT>", "pull"]})


@pytest.mark.parametrize("reducer", ["grids", "mean", "uniform", "pool", "tome"])
def test_every_reducer_before_the_trunk(pi0, reducer):
    policy, batch = pi0
    options = {"camera_tokens": {"observation.images.1": 2}} if reducer == "grids" else {}
    policy = train_offsets(wrap(policy.detach(), 4, reducer, **options))
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    (found,) = policy.seam.runtime.differences.values()
    assert found < ROUNDING
    assert apart(expected, act(policy, batch)) < ROUNDING


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_bfloat16_stays_within_its_bound(family_row, name):
    row = family_row(name)
    policy = train_offsets(wrap(row.policy(2, **row.bfloat16), 5))
    batch = row.batch(policy.base)
    expected = act(policy, batch)
    policy.use_runtime("fast")
    act(policy, batch)
    assert apart(expected, act(policy, batch)) < fast.BOUNDS[torch.bfloat16] / 2
