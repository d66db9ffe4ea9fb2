"""Weights fit exactly or are refused, and so do budgets."""

import functools
import itertools
import re

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
        pytest.skip("LeRobot renames no weights of this family by that method")
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


# Florence-2's own code, as published X-VLA checkpoints have it, by today's names.
FLORENCE = (
    (r"(vision_tower\.convs\.\d+)\.conv\.", r"\1.proj."),
    (r"(\.(?:spatial|channel)_block\.conv[12])\.", r"\1.fn.dw."),
    (r"\.spatial_block\.norm1\.", ".spatial_block.window_attn.norm."),
    (r"\.channel_block\.norm1\.", ".channel_block.channel_attn.norm."),
    (r"_block\.norm2\.", "_block.ffn.norm."),
    (r"_block\.(window|channel)_attn\.(?!norm)", r"_block.\1_attn.fn."),
    (r"_block\.ffn\.(?!norm)", "_block.ffn.fn.net."),
    (r"multi_modal_projector\.image_position_embed", "image_pos_embed"),
    (r"multi_modal_projector\.image_projection\.weight", "image_projection"),
    (r"multi_modal_projector\.", ""),
    (r"vlm\.language_model\.", "vlm.language_model.model."),
)


@pytest.mark.parametrize("family", ["xvla"], indirect=True)
def test_published_florence_weights_are_understood(family, tmp_path):
    """What LeRobot makes of such a file, this loader makes of it, too."""
    from lerobot.policies.xvla.modeling_xvla import _remap_vendored_florence_state_dict

    policy, other = family.policy(), family.policy()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    old = {}
    for name, value in policy.state_dict().items():
        before = functools.reduce(lambda text, rule: re.sub(*rule, text), FLORENCE, name)
        old[before] = (value.T if before.endswith("image_projection") else value).clone(
            memory_format=torch.contiguous_format
        )
    old["model.vlm.language_model.final_logits_bias"] = torch.zeros(1)  # dropped on purpose
    assert len(old.keys() - policy.state_dict().keys()) > 50
    expected = _remap_vendored_florence_state_dict(old)
    save_file(old, tmp_path / "model.safetensors")
    load_checkpoint(other, tmp_path)
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name]), name
        assert torch.equal(value, policy.state_dict()[name]), name


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
    batch = family.changed(policy, batch, **{k: torch.rand_like(batch[k]) for k in policy.config.image_features})
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
