"""Wall-X: its grids, its padded prompts, what it refuses and what it does not read."""

import copy

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

from driving import act, loss_of, train_offsets, wrap
from lerobot_grids.profiling import architectures
from lerobot_grids.profiling.measure import count_flops, prefix_length
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint import build
from lerobot_policy_grids.checkpoint.save import save_policy
from lerobot_policy_grids.errors import CheckpointError, TokenGridError, UnsupportedPolicyError
from lerobot_policy_grids.families import get_family

pytest.importorskip("torchdiffeq", reason="Wall-X needs torchdiffeq")
pytest.importorskip("qwen_vl_utils", reason="Wall-X needs qwen-vl-utils")


@pytest.fixture(scope="module")
def wall_x(tmp_path_factory):
    inputs = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)) for name in ("top", "wrist")}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    torch.manual_seed(0)
    return get_family("wall_x").small(inputs, outputs, tmp_path_factory.mktemp("wall_x")).eval()


def observations(policy, *tasks, shape=(48, 64)):
    """A batch as LeRobot's pre-processor gives it."""
    torch.manual_seed(1)
    batch = {key: torch.rand(len(tasks), 3, *shape) for key in policy.config.image_features}
    batch |= {"observation.state": torch.randn(len(tasks), 4), "action": torch.randn(len(tasks), 8, 4)}
    return batch | {"task": list(tasks)}


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (90, 60), (240, 320)])
def test_the_grid_is_the_one_that_lerobot_makes(wall_x, shape):
    policy = copy.deepcopy(wall_x)
    for feature in policy.config.image_features.values():
        feature.shape = (3, *shape)
    grids = policy.preprocess_inputs(observations(policy, "push.", shape=shape))["image_grid_thw"]
    assert (grids == grids[0]).all()
    assert get_family("wall_x").layout(policy).token_grid == tuple((grids[0, 1:] // 2).tolist())


@pytest.mark.parametrize("position_ids", ["dense", "consecutive"])
def test_at_all_tokens_a_padded_prompt_is_the_dense_one(wall_x, position_ids):
    """Positions are those that LeRobot computes, in training before the model and later inside it."""
    policy = copy.deepcopy(wall_x)
    batch = observations(policy, "push.", "lift a cup.")
    assert not policy.preprocess_inputs(batch)["attention_mask"].all()
    loss, chunk = loss_of(policy, batch), act(policy, batch)
    wrapped = wrap(policy, 7 * 9, position_ids=position_ids)
    assert torch.equal(loss_of(wrapped, batch), loss)
    assert torch.equal(act(wrapped, batch), chunk)
    few = train_offsets(wrap(wrapped.detach(), 4, position_ids=position_ids))
    reduced = policy.preprocess_inputs(batch)
    for name in ("input_ids", "attention_mask", "moe_token_types"):
        assert reduced[name].shape == reduced["position_ids"].shape[1:], name
    assert reduced["moe_token_types"].sum() == 2 * 8
    assert not torch.equal(act(few, batch), chunk)


def test_a_missing_camera_and_another_size_are_named(wall_x):
    wrapped = wrap(copy.deepcopy(wall_x), 4)
    batch = observations(wrapped.base, "push.")
    with pytest.raises(TokenGridError, match="1 samples of 2 cameras have 1 images"):
        act(wrapped, {name: value for name, value in batch.items() if not name.endswith("wrist")})
    with pytest.raises(TokenGridError, match=r"\[\[1, 18, 18\]\], expected \[1, 14, 18\]"):
        act(wrapped, observations(wrapped.base, "push.", shape=(64, 64)))


def test_action_tokens_are_refused(wall_x):
    policy = copy.deepcopy(wall_x)
    policy.config.prediction_mode = "fast"
    with pytest.raises(UnsupportedPolicyError, match="only prediction_mode=diffusion is supported"):
        wrap(policy, 4)


def test_weights_that_are_loaded_afterwards_are_not_read(wall_x, tmp_path, monkeypatch):
    wrapped = wrap(copy.deepcopy(wall_x), 4)
    save_policy(wrapped, tmp_path)
    loaded = GridsPolicy.from_pretrained(tmp_path)
    batch = observations(loaded.base, "push.")
    # Of its own ten steps; the small policy takes fewer.
    loaded.base.model.predict = wall_x.model.predict.func.__get__(loaded.base.model)
    wrapped.base.model.predict = wall_x.model.predict.func.__get__(wrapped.base.model)
    assert torch.equal(act(loaded, batch), act(wrapped, batch))
    with pytest.raises(CheckpointError, match=r"cannot be read or downloaded .*weights"):
        build(wall_x.config, fresh=True)


def test_flops_of_a_checkpoint_are_counted(wall_x, monkeypatch):
    monkeypatch.setattr(architectures, "STATE_SIZE", 4)
    policy = copy.deepcopy(wall_x)
    batch = architectures.make_batch(policy, 12, "cpu")
    dense, length = count_flops(policy, batch), prefix_length(policy, batch)
    wrapped = wrap(policy, 4)
    few = count_flops(wrapped, batch)
    assert prefix_length(wrapped, batch) == length - 2 * (7 * 9 - 4)
    assert few["vision"] == dense["vision"]
    assert few["prefill"] < dense["prefill"] / 2
