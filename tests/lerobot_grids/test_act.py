"""ACT: positions between cells, costs by a formula, and a start without a checkpoint."""

import json
from importlib.util import find_spec
from urllib.error import URLError

import pytest
import torch
import torchvision
from lerobot.configs import FeatureType, PolicyFeature
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from driving import act, train_offsets, wrap
from formulas import linear
from lerobot_grids.data.metadata import load_metadata
from lerobot_grids.policies.starting import start
from lerobot_grids.profiling.bench import bench
from lerobot_policy_grids.checkpoint import check_published
from lerobot_policy_grids.checkpoint.save import save_processors
from lerobot_policy_grids.errors import CheckpointError, GridsError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.act import small_backbone
from lerobot_policy_grids.processor_grids import make_processors
from lerobot_policy_grids.runtime.convolutions import without_norms

STATISTICS = {
    name: {"mean": torch.zeros(size), "std": torch.ones(size)}
    for name, size in {"observation.state": (4,), "action": (4,)}.items()
}
STATISTICS |= {f"observation.images.{i}": {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)} for i in range(2)}
SMALL = {"dim_model": 32, "n_heads": 2, "dim_feedforward": 64, "chunk_size": 8, "n_action_steps": 8}


@pytest.fixture
def policy():
    inputs = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)) for i in range(2)}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
    torch.manual_seed(0)
    return get_family("act").small(inputs, {"action": PolicyFeature(FeatureType.ACTION, (4,))}, None).eval()


def observation(policy):
    torch.manual_seed(1)
    batch = {name: torch.rand(2, *feature.shape) for name, feature in policy.config.image_features.items()}
    return batch | {"observation.state": torch.randn(2, 4)}


def test_a_token_has_the_position_of_the_place_where_it_was_read(policy):
    wrapped = train_offsets(wrap(policy, 5))
    batch, model, seen, places = observation(policy), policy.model, [], []
    for module, name in ((model.encoder, "pos_embed"), (model.decoder, "encoder_pos_embed")):
        module.register_forward_pre_hook(lambda m, a, kwargs, name=name: seen.append(kwargs[name]), with_kwargs=True)
    wrapped.reducer.register_forward_hook(lambda m, inputs, output: places.append(output.coordinates))
    act(wrapped, batch)
    dense = model.encoder_cam_feat_pos_embed(torch.zeros(1, 1, 6, 8))
    (coordinates,) = places
    read = functional.grid_sample(
        dense.expand(4, -1, -1, -1), 2 * coordinates[:, None] - 1, align_corners=False, padding_mode="border"
    )[:, :, 0].permute(2, 0, 1)
    expected = torch.cat(read.split(2, dim=1))
    assert not torch.equal(expected[:, 0], expected[:, 1])
    for positions in seen:
        assert positions.shape == (2 + 10, 2, 32)
        # Read at whole 256ths of a cell.
        torch.testing.assert_close(positions[2:], expected, atol=4e-3, rtol=0)
        own = model.encoder_1d_feature_pos_embed.weight[:, None].expand(-1, 2, -1)
        assert torch.equal(positions[:2], own)


def test_consecutive_positions_are_those_of_the_first_cells(policy):
    wrapped, seen = wrap(policy, 5, position_ids="consecutive"), []
    policy.model.encoder.register_forward_pre_hook(
        lambda m, a, kwargs: seen.append(kwargs["pos_embed"]), with_kwargs=True
    )
    # Whoever watches the coordinates changes no positions.
    wrapped.seam.remember_coordinates()
    act(wrapped, observation(policy))
    first = policy.model.encoder_cam_feat_pos_embed(torch.zeros(1, 1, 6, 8)).flatten(2)[0, :, :5].T
    torch.testing.assert_close(seen[0][2:, 0], torch.cat([first, first]))


def test_flops_are_those_of_a_formula():
    dense, sampled = bench("act", [16], cameras=2).costs
    assert (dense.visual_tokens, dense.prefix_length, sampled.prefix_length) == (300, 602, 34)

    def transformer(tokens, actions=100, width=512, inner=3200):
        encoder = 4 * linear(tokens, width, width) + 4 * tokens**2 * width + linear(tokens, width, inner, width)
        own = 4 * linear(actions, width, width) + 4 * actions**2 * width
        cross = 2 * linear(actions, width, width) + 2 * linear(tokens, width, width) + 4 * actions * tokens * width
        ends = linear(1, 32, width) + linear(1, 14, width) + linear(actions, width, 14)
        return 4 * encoder + own + cross + linear(actions, width, inner, width) + ends

    for cost in (dense, sampled):
        assert cost.flops["prefill"] == transformer(cost.prefix_length)
        assert cost.flops["projector"] == 2 * linear(300, 512, 512)
        assert cost.flops["steps"] == 0
    assert dense.flops["vision"] == sampled.flops["vision"]
    assert 1 - sampled.total_flops / dense.total_flops == pytest.approx(0.331, abs=5e-4)


def test_a_new_policy_starts_from_imagenet_and_its_checkpoint_asks_for_nothing(dataset, monkeypatch, tmp_path):
    weights = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: weights)
    loaded = start("act", 4, load_metadata(str(dataset)), base={"chunk_size": 8, "n_action_steps": 8})
    backbone = loaded.policy.base.model.backbone
    assert torch.equal(backbone.layer4[0].conv1.weight, weights["layer4.0.conv1.weight"])
    loaded.policy.config.save_pretrained(tmp_path)
    base = json.loads((tmp_path / "config.json").read_text())["base"]
    assert base["pretrained_backbone_weights"] is None
    assert base["chunk_size"] == 8
    (normaliser,) = [step for step in loaded.preprocessor.steps if hasattr(step, "stats")]
    assert normaliser.stats["observation.image"]["mean"].flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_what_cannot_be_downloaded_is_one_line(dataset, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fail)
    line = (
        r"'ResNet18_Weights.IMAGENET1K_V1' of ACT's resnet18 cannot be downloaded \(<urlopen error no route to host>\)"
    )
    with pytest.raises(CheckpointError, match=line + ".*--base.pretrained_backbone_weights null"):
        start("act", 4, load_metadata(str(dataset)))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"base": {"chunk_sise": 8}}, "the 'act' policy has no option chunk_sise; drop it"),
        ({"base": {"chunk_size": 8}}, "the 'act' policy cannot have .*upper bound"),
        ({"resolution": 64}, "--resolution 64: the size of the images of the 'act' policy is that"),
    ],
)
def test_options_that_do_not_fit_are_refused(dataset, options, line):
    with pytest.raises(GridsError, match=line):
        start("act", 4, load_metadata(str(dataset)), **options)


def test_a_published_one_is_checked(policy, tmp_path):
    wrapped = wrap(policy, 5)
    wrapped.save_pretrained(tmp_path)
    save_processors(tmp_path, *make_processors(policy.config, STATISTICS))
    check_published(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for field, value, line in (
        ("vision_backbone", "ResNet", "vision_backbone='ResNet', expected one of resnet101"),
        ("n_encoder_layers", 4000, "n_encoder_layers=4000, expected at most 32"),
        ("use_vae", 1, "use_vae=1, expected bool"),
    ):
        path.write_text(json.dumps(content | {"base": content["base"] | {field: value}}))
        with pytest.raises(CheckpointError, match=line):
            check_published(tmp_path)


VARIANTS = {
    "norms in front": {"pre_norm": True},
    "several decoder layers": {"n_decoder_layers": 3},
    "positions of the first cells": {},
    "an environment": {},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fast_path_acts_as_the_slow_one(variant, capfd):
    inputs = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)) for i in range(2)}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
    if variant == "an environment":
        inputs["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (3,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    torch.manual_seed(0)
    base = get_family("act").small(inputs, outputs, None, **VARIANTS[variant]).eval()
    for weight in base.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    options = {"position_ids": "consecutive"} if variant == "positions of the first cells" else {}
    wrapped = train_offsets(wrap(base, 5, **options))
    batch = observation(base) | {"observation.environment_state": torch.randn(2, 3)}
    expected = act(wrapped, batch)
    wrapped.use_runtime("fast")
    act(wrapped, batch)
    assert "visual tokens on cpu: the first action chunk differs" in capfd.readouterr().err
    size = float(expected.max() - expected.min())
    assert 0 < float((act(wrapped, batch) - expected).abs().max()) < 3e-6 * size
    for name in ("observation.state", *(["observation.environment_state"] if variant == "an environment" else [])):
        changed = act(wrapped, batch | {name: batch[name] + 1})
        assert float((changed - expected).abs().max()) > 1e-3 * size


def test_norms_become_part_of_the_convolutions():
    resnet = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d).eval()
    for norm in (module for module in resnet.modules() if isinstance(module, FrozenBatchNorm2d)):
        for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            value += 0.3 * torch.rand_like(value)
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = resnet(images)
        fused = without_norms(resnet)
        torch.testing.assert_close(fused(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert not any(isinstance(module, FrozenBatchNorm2d) for module in fused.modules())
        assert torch.equal(resnet(images), expected)


def test_what_the_fast_path_does_not_rewrite_is_said(policy, caplog):
    wrapped = train_offsets(wrap(policy, 5))
    expected = act(wrapped, observation(policy))
    policy.model.encoder.layers[0].self_attn.register_forward_hook(lambda module, inputs, output: output)
    wrapped.use_runtime("fast")
    for _ in range(2):
        assert torch.equal(act(wrapped, observation(policy)), expected)
    assert "an attention is a MultiheadAttention or has hooks" in caplog.text


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao: extra 'quantise' is not installed")
def test_no_weights_of_8_bits(policy, caplog):
    wrapped = wrap(policy, 5)
    wrapped.use_runtime("fast", "int8")
    act(wrapped, observation(policy))
    assert "changes layers of a language model, and this policy acts without one" in caplog.text


def test_a_trained_policy_keeps_its_robot_and_its_cameras(dataset, tmp_path):
    meta = load_metadata(str(dataset))
    with small_backbone():
        base = {"pretrained_backbone_weights": None, **SMALL}
        loaded = start("act", "dense", meta, base=base)
        loaded.save(tmp_path)
        assert start(str(tmp_path), 4, meta).policy.num_tokens == 4
        with pytest.raises(GridsError, match=r"--base sets chunk_size, but .* is a checkpoint with options of its own"):
            start(str(tmp_path), 4, meta, base={"chunk_size": 4})
        config = json.loads((tmp_path / "config.json").read_text())
        more = config["input_features"] | {"observation.images.side": {"type": "VISUAL", "shape": [3, 48, 64]}}
        (tmp_path / "config.json").write_text(json.dumps(config | {"input_features": more}))
        with pytest.raises(GridsError, match=r"lacks observation.images.side, .* act does not go without; record"):
            start(str(tmp_path), 4, meta)
        wide = {"action": {"type": "ACTION", "shape": [7]}}
        (tmp_path / "config.json").write_text(json.dumps(config | {"output_features": wide}))
        with pytest.raises(GridsError, match=r"action has 4 dimensions, .* was trained with 7, .*; start a new one"):
            start(str(tmp_path), 4, meta)
