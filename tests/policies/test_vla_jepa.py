"""VLA-JEPA as LeRobot trains it by default: with its world model, which sees videos."""

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

from driving import ROUNDING, train_offsets, wrap
from lerobot_policy_grids.families import get_family

pytest.importorskip("diffusers")
CAMERAS, BATCH, STEPS, SIDE = 2, 2, 8, 64


@pytest.fixture
def policy(tmp_path):
    """With a video encoder of one layer, saved as the one on the Hub is."""
    from transformers import VJEPA2Config, VJEPA2Model, VJEPA2VideoProcessor

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 16}
    sizes |= {"pred_hidden_size": 16, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    encoder = VJEPA2Config(crop_size=SIDE, image_size=SIDE, frames_per_clip=STEPS, tubelet_size=2, **sizes)
    torch.manual_seed(0)
    VJEPA2Model(encoder).save_pretrained(tmp_path / "encoder")
    processor = VJEPA2VideoProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(tmp_path / "encoder")
    images = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for i in range(CAMERAS)}
    state, action = PolicyFeature(FeatureType.STATE, (4,)), PolicyFeature(FeatureType.ACTION, (4,))
    return get_family("vla_jepa").small(
        images | {"observation.state": state},
        {"action": action},
        tmp_path,
        enable_world_model=True,
        jepa_encoder_name=str(tmp_path / "encoder"),
        predictor_depth=1,
        predictor_num_heads=2,
    )


def losses(policy, batch):
    """(The loss, the part of the world model, the part of the actions), with every random draw fixed."""
    torch.manual_seed(4)
    loss, parts = policy.forward(dict(batch))
    return loss, torch.tensor([parts["wm_loss"], parts["action_loss"]])


def test_the_world_model_trains_beside_the_reducer(policy):
    torch.manual_seed(1)
    batch = {name: torch.rand(BATCH, STEPS, 3, SIDE, SIDE) for name in policy.config.image_features}
    batch |= {"observation.state": torch.randn(BATCH, STEPS, 4), "action": torch.randn(BATCH, STEPS, 4)}
    batch |= {"action_is_pad": torch.zeros(BATCH, STEPS, dtype=torch.bool), "task": ["push", "pick up the mug"]}
    policy.eval()
    loss, parts = losses(policy, batch)
    assert (parts > 0).all()
    wrapped = wrap(policy, 64)
    same, same_parts = losses(wrapped, batch)
    torch.testing.assert_close(same, loss, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(same_parts, parts, atol=ROUNDING, rtol=0)
    few = train_offsets(wrap(wrapped.detach(), 4))
    _, few_parts = losses(few, batch)
    # Both parts read what the language model makes of the tokens.
    assert ((few_parts - parts).abs() > 1e-6).all()
    # LeRobot leaves the actions' part out where there are none.
    for own in (batch, {name: value for name, value in batch.items() if name != "action"}):
        few.zero_grad()
        few.forward(dict(own))[0].backward()
        assert few.reducer.query.weight.grad.abs().sum() > 0
    assert "action_loss" not in few.forward(dict(own))[1]
