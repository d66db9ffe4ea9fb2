"""The ResNet that stands for ResNet18 in benchmarks/small_act.py."""

import torchvision
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy

import kept_results
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.base import replaced


def test_lerobots_act_gets_36_tokens_from_a_small_resnet():
    before = torchvision.models.resnet18
    small_act = kept_results.load_script("small_act")
    assert torchvision.models.resnet18 is before, "imported by others it replaces nothing"
    config = ACTConfig(
        device="cpu",
        input_features={
            "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (4,))},
        pretrained_backbone_weights=None,
        dim_model=32,
        n_heads=2,
        dim_feedforward=64,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
    )
    with replaced(torchvision.models, resnet18=small_act.resnet18):
        policy = ACTPolicy(config)
    assert get_family("act").layout(policy).token_grid == (6, 6)
    assert 0.2e6 < sum(weight.numel() for weight in policy.model.backbone.parameters()) < 0.4e6
