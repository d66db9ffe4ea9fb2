"""Weights fit exactly or are refused, and so do budgets."""

import itertools

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from safetensors.torch import load_file, save_file

from driving import run, train_offsets, wrap
from lerobot_policy_grids.checkpoint.load import load_checkpoint
from lerobot_policy_grids.checkpoint.weights import load_weights
from lerobot_policy_grids.errors import BudgetError, CheckpointError, UnsupportedPolicyError
from lerobot_policy_grids.families import get_family


def test_a_dense_checkpoint_is_loaded_exactly_or_refused(family, tmp_path):
    policy, other = family.policy(), family.policy()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    policy.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    load_checkpoint(other, tmp_path)
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in other.state_dict().items())
    tensors = load_file(weights)
    head = next(get_family(policy.config.type).target(policy).module.parameters())
    stored = policy.state_dict(keep_vars=True)
    name = next(name for name in sorted(tensors) if stored[name].data_ptr() == head.data_ptr())
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != name}, "missing"),
        (tensors | {"stranger": torch.zeros(1)}, "unexpected"),
        (tensors | {name: torch.zeros(1)}, "has shape"),
        (tensors | {name: torch.full_like(tensors[name], torch.nan)}, "NaN"),
    ):
        save_file(broken, weights)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(other, tmp_path)
    weights.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(other, tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(other, tmp_path)


def test_names_of_older_checkpoints_are_understood(family, tmp_path):
    """LeRobot renames some keys while it loads; so must a loader that replaces it."""
    policy, other = family.policy(), family.policy()
    if not hasattr(policy, "_fix_pytorch_state_dict_keys"):
        pytest.skip("the names of this family's weights never changed")
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    old = {name.removeprefix("model."): value.clone() for name, value in policy.state_dict().items()}
    kind = policy.config.type
    if kind == "pi0":
        old = {name.replace("action_time_mlp_", "time_mlp_"): value for name, value in old.items()}
    elif kind == "pi05":
        old = {name.replace("time_mlp_", "action_time_mlp_"): value for name, value in old.items()}
        old["state_proj.weight"] = torch.zeros(1)  # of π0, dropped on purpose
    embedding = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    old.pop(embedding, None)  # taken from the head
    expected = policy.state_dict()
    expected[f"model.{embedding}"] = expected["model.paligemma_with_expert.paligemma.lm_head.weight"]
    save_file(old, tmp_path / "model.safetensors")
    load_checkpoint(other, tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


def test_attaching_twice_is_refused(family):
    wrapped = wrap(family.policy(), 9)
    with pytest.raises(UnsupportedPolicyError, match="detach it first"):
        wrapped.family.attach(wrapped.base, wrapped.seam)


def test_more_tokens_than_the_dense_policy_has_are_refused(family):
    with pytest.raises(BudgetError, match=str(family.tokens_per_camera)):
        wrap(family.policy(), family.tokens_per_camera + 1)


def test_the_budget_may_change_at_run_time(family):
    policy = family.policy()
    wrapped = train_offsets(wrap(policy, 16, num_tokens_max=36))
    batch = family.batch(policy)
    seen = family.lengths(policy)
    lengths = []
    for k in (36, 16, 1):
        wrapped.num_tokens = k
        assert torch.isfinite(wrapped.predict_action_chunk(dict(batch))).all()
        lengths.append(seen[-1])
    assert [a - b for a, b in itertools.pairwise(lengths)] == [20, 15]


def test_blind_hands_over_no_visual_token(family):
    policy = family.policy(cameras=2)
    batch = family.batch(policy)
    wrapped = wrap(policy, 1, reducer="blind")
    loss, chunk, _ = run(wrapped, batch)
    for key in policy.config.image_features:
        batch[key] = torch.rand_like(batch[key])
    blind_loss, blind_chunk, _ = run(wrapped, batch)
    assert torch.equal(blind_loss, loss)
    assert torch.equal(blind_chunk, chunk)
    assert wrapped.num_tokens == 0
    with pytest.raises(BudgetError, match="blind"):
        wrapped.num_tokens = 5


def test_saved_weights_are_loaded_exactly(family, tmp_path):
    wrapped = train_offsets(wrap(family.policy(), 16, num_tokens_max=25))
    batch = family.batch(wrapped.base)
    wrapped.save_pretrained(tmp_path)
    other = wrap(family.policy(), 16, num_tokens_max=25)
    assert not torch.equal(run(other, batch)[0], run(wrapped, batch)[0])
    load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(run(other, batch)[0], run(wrapped, batch)[0])
    config = PreTrainedConfig.from_pretrained(tmp_path)
    assert (config.reducer.num_tokens, config.reducer.num_tokens_max, config.base.type) == (
        16,
        25,
        wrapped.base.config.type,
    )
