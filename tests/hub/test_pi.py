"""Adapters of the π policies: tied weights, names of older releases, and bfloat16 trunks with float32 parts."""

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from safetensors.torch import load_file, save_file

from comparing import BASE, assert_same_bits, state_of
from driving import train_offsets, wrap
from lerobot_policy_grids.checkpoint.find import read_config
from lerobot_policy_grids.checkpoint.load import build, load_checkpoint
from lerobot_policy_grids.families.pi import SMALL_IMAGE, small_sizes
from published import as_adapter, as_full

PROCESSORS = ("policy_preprocessor.json", "policy_postprocessor.json")


@pytest.fixture(params=["pi0", "pi05"])
def kind(request):
    """A π policy that is constructed small, wherever it is constructed."""
    with small_sizes(request.param):
        yield request.param


@pytest.fixture(params=["float32", "bfloat16"])
def dense(request, kind):
    size = (SMALL_IMAGE, SMALL_IMAGE)
    sizes = {"chunk_size": 8, "n_action_steps": 8, "max_state_dim": 8, "max_action_dim": 8, "image_resolution": size}
    config = PreTrainedConfig.get_choice_class(kind)(device="cpu", dtype=request.param, **sizes)
    config.input_features = {
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, *size)),
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
    }
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    torch.manual_seed(0)
    return get_policy_class(kind)(config)


def test_an_adapter_is_the_policy_bit_for_bit(hub, dense, kind, tmp_path):
    base, full, adapter, merged = (tmp_path / name for name in ("base", "full", "adapter", "merged"))
    dense.save_pretrained(base)
    # As the published checkpoints: float32, without the prefix that LeRobot adds.
    stored = {name.removeprefix("model."): t.float() for name, t in load_file(base / "model.safetensors").items()}
    save_file(stored, base / "model.safetensors")
    revision = hub.add_folder(BASE, base)
    policy = train_offsets(wrap(dense, 16, base_repo_id=BASE, base_revision=revision))
    with torch.no_grad():
        dense.model.action_out_proj.weight += 0.01
    policy.save_pretrained(full)
    for name in PROCESSORS:
        (full / name).write_text("{}")
    as_adapter(full, adapter)
    as_full(adapter, merged)
    names = load_file(adapter / "grids_adapter.safetensors").keys()
    assert {name for name in names if not name.startswith("reducer.")} == {"base.model.action_out_proj.weight"}
    for folder in (full, adapter, merged):
        loaded = build(read_config(folder))
        load_checkpoint(loaded, folder)
        assert_same_bits(state_of(loaded), state_of(policy))
    assert_same_bits(load_file(merged / "model.safetensors"), load_file(full / "model.safetensors"))
