"""Families whose visual tokens go into placeholders of the prompt: positions, processors, what must be installed."""

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors

from driving import wrap
from lerobot_grids.policies.loaded import set_flow_steps
from lerobot_policy_grids.checkpoint import build
from lerobot_policy_grids.checkpoint.save import save_policy, save_processors
from lerobot_policy_grids.errors import UnsupportedPolicyError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.evo1 import scattered_positions
from lerobot_policy_grids.processor_grids import make_processors

INPUTS = {
    "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
    "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
}
OUTPUTS = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
STATISTICS = {
    name: {"min": torch.full((4,), -3.0), "max": torch.full((4,), 5.0)} for name in ("observation.state", "action")
}


@pytest.fixture(scope="module")
def evo1(tmp_path_factory):
    return get_family("evo1").small(INPUTS, OUTPUTS, tmp_path_factory.mktemp("evo1"), chunk_size=2, n_action_steps=2)


@pytest.mark.parametrize("cells", [False, True])
def test_positions_are_those_of_the_sequence_with_every_token(cells):
    """Two views of 2 x 2 cells with one and two tokens, and one without: [s] v [e] | [s] v v [e] | [s] [e] w w."""
    text = "s.e s..e se ww".replace(" ", "")
    images = torch.tensor([[c == "." for c in text]] * 2)
    starts = torch.tensor([[c == "s" for c in text]] * 2)
    places = [torch.tensor([[2.0], [1.5]]), torch.tensor([[0.0, 3.0], [0.5, 2.25]])] if cells else None
    ids = scattered_positions(images, starts, [1, 2, 0], [4, 4, 4], places)
    # s 0, view 1-4, e 5, s 6, view 7-10, e 11, s 12, view 13-16, e 17, w 18, w 19
    if cells:
        assert ids.tolist() == [
            [0, 3, 5, 6, 7, 10, 11, 12, 17, 18, 19],
            [0, 2.5, 5, 6, 7.5, 9.25, 11, 12, 17, 18, 19],
        ]
    else:
        assert ids.tolist() == [[0, 1, 5, 6, 7, 8, 11, 12, 17, 18, 19]] * 2


def test_an_instruction_may_look_like_a_view():
    text = "s..e<s.x"
    images = torch.tensor([[c == "." and i < 3 for i, c in enumerate(text)]])
    starts = torch.tensor([[c == "s" for c in text]])
    assert scattered_positions(images, starts, [2], [2], None).tolist() == [list(range(8))]


def test_reloaded_processors_are_restored_as_for_the_dense_policy(evo1, tmp_path):
    """LeRobot gives them back what a file cannot hold, by the type of the configuration."""
    save_policy(evo1, tmp_path)
    save_processors(tmp_path, *make_processors(evo1.config, STATISTICS))
    # As lerobot-train gives the statistics of a dataset, which are narrower than the policy.
    overrides = {"normalizer_processor": {"stats": STATISTICS}, "device_processor": {"device": "cpu"}}
    batch = {
        "observation.images.top": torch.rand(2, 3, 64, 64),
        "observation.state": torch.randn(2, 4),
        "action": torch.randn(2, 2, 4),
        "task": ["a", "b"],
        "embodiment_id": torch.tensor([0, 0]),
    }
    wrapped = wrap(evo1, 4)
    try:
        evo1.config.binarize_gripper, evo1.config.gripper_index = True, 3
        made = [
            make_pre_post_processors(config, pretrained_path=str(tmp_path), preprocessor_overrides=overrides)
            for config in (evo1.config, wrapped.config)
        ]
    finally:
        wrapped.detach()
    (pre, post), (pre_k, post_k) = made
    expected, got = pre(dict(batch)), pre_k(dict(batch))
    assert torch.equal(got["embodiment_id"], batch["embodiment_id"])
    assert got["observation.state"].shape == (2, 8)
    for name in ("observation.state", "action", "action_mask"):
        assert torch.equal(got[name], expected[name]), name
    chunk = torch.randn(2, 8)
    assert torch.equal(post_k(chunk), post(chunk))
    assert set(post_k(chunk)[:, 3].tolist()) <= {-1.0, 1.0}


def test_another_policys_processors_are_left_alone(evo1):
    from lerobot.policies import factory
    from lerobot.policies.act.configuration_act import ACTConfig

    wrap(evo1, 4).detach()
    assert isinstance(evo1.config, factory.Evo1Config)
    assert not isinstance(ACTConfig(device="cpu"), factory.Evo1Config)


def test_a_missing_package_is_named_with_its_extra(evo1, monkeypatch):
    from lerobot.policies.evo1 import internvl3_embedder

    def missing(name, extra):
        raise ImportError(f"'{name}' is required but not installed")

    monkeypatch.setattr(internvl3_embedder, "require_package", missing)
    with pytest.raises(UnsupportedPolicyError, match=r"not installed\); pip install 'lerobot_policy_grids\[evo1\]'$"):
        build(evo1.config)


def test_the_gradient_reaches_the_reducer_through_a_frozen_model(evo1):
    """LeRobot cuts what its frozen vision-language model gives from the graph."""
    assert not evo1._tracks_vlm_gradients
    wrapped = wrap(evo1, 4)
    batch = make_processors(evo1.config, STATISTICS)[0](
        {"observation.images.top": torch.rand(2, 3, 64, 64), "observation.state": torch.randn(2, 4)}
        | {"action": torch.randn(2, 2, 4), "task": ["push", "pull"]}
    )
    wrapped.forward(batch)[0].backward()
    assert wrapped.reducer.query.weight.grad.abs().sum() > 0
    wrapped.detach()


def test_the_steps_of_evo1_can_be_set(evo1):
    """LeRobot reads their number when it builds the policy."""
    calls = []
    handle = evo1.model.action_head.mlp_head.register_forward_hook(lambda *args: calls.append(1))
    set_flow_steps(evo1, 5)
    evo1.predict_action_chunk(
        {"observation.images.top": torch.rand(1, 3, 64, 64), "observation.state": torch.randn(1, 8), "task": ["a"]}
    )
    handle.remove()
    set_flow_steps(evo1, 3)
    assert len(calls) == 5
