"""EO1, VLA-JEPA and Wall-X at their published sizes, without weights: what they cost, and how big they are."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.groot import groot_n1_7
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from formulas import linear, qwen, qwen_2_5_tower, qwen_3_tower, sampler
from kept_results import lines
from lerobot_grids.profiling import architectures
from lerobot_grids.profiling.known_values import KnownValues
from lerobot_grids.profiling.measure import count_flops, prefix_length
from lerobot_policy_grids import compress
from lerobot_policy_grids.errors import UnsupportedPolicyError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.published_qwen import QWEN_2_5_VL_3B, QWEN_3_VL_2B

NEEDS = {"wall_x": ("torchdiffeq", "qwen_vl_utils"), "vla_jepa": ("diffusers",)}
FAMILIES = ("eo1", "vla_jepa", "wall_x")
# Tokens of what LeRobot writes around two images and the instruction.
AROUND = {"eo1": 1 + 8, "vla_jepa": 24 + 32 + 27, "wall_x": 1 + 32 + 47}
WORDS, STATE, WIDTH = 48, 14, 2048


@pytest.fixture(params=FAMILIES)
def family(request):
    for package in NEEDS.get(request.param, ()):
        pytest.importorskip(package)
    return request.param


def test_flops_are_counted_without_values(family, tmp_path, monkeypatch):
    """On the meta device as many as with values, where attention is the products that the counter knows."""
    monkeypatch.setattr(architectures, "STATE_SIZE", 4)
    inputs = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for name in ("top", "wrist")}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    small = get_family(family).small(inputs, outputs, tmp_path).eval()
    again = architectures.instantiate(copy.deepcopy(small.config), "meta")
    assert get_family(family).layout(again) == get_family(family).layout(small)
    counted = []
    for place in ("cpu", "meta"):
        policy = copy.deepcopy(small).to(place)
        policy.config.device = place
        get_family(family).finish(policy)
        batch = architectures.make_batch(policy, 12, place)
        for tokens in (None, 16):
            measured = policy if tokens is None else compress(policy, tokens)
            with sdpa_kernel(SDPBackend.MATH), KnownValues() if place == "meta" else nullcontext():
                counted.append((prefix_length(measured, batch), count_flops(measured, batch)))
    with pytest.raises(UnsupportedPolicyError, match=f"a training step of the '{family}' policy cannot be predicted"):
        policy.forward({})
    dense, few, *without_values = counted
    assert without_values == [dense, few]
    assert few[0] == dense[0] - 2 * (get_family(family).layout(small).num_dense_tokens - 16)
    assert all(count > 0 for stage, count in few[1].items() if (family, stage) != ("wall_x", "steps"))


def eo1(tokens, layers, depth, full):
    length = 2 * (tokens + 2) + WORDS + AROUND["eo1"]
    shape = {"width": WIDTH, "mlp": 11008, "inner": 2048, "shared": 256, "layers": layers}
    around = linear(8, 32, WIDTH) + linear(8, 2 * WIDTH, WIDTH, WIDTH) + linear(8, WIDTH, WIDTH, 32)
    return {
        "vision": qwen_2_5_tower(2, 9, depth, full),
        "projector": 2 * linear(81, 4 * 1280, 4 * 1280, WIDTH),
        "sampler": sampler(2, tokens, 81, WIDTH, WIDTH, 32) if tokens < 81 else 0,
        # The actions are no part of it.
        "prefill": qwen(length - 8, length - 8, **shape) + linear(1, 32, WIDTH),
        "steps": 10 * (qwen(8, length, **shape) + around),
    }


def vla_jepa(tokens, layers, depth, deepstack, blocks=16):
    length, inner, rows = 2 * (tokens + 2) + WORDS + AROUND["vla_jepa"], 768, 1 + 32 + 7
    trunk = qwen(length, length, WIDTH, 6144, 2048, 1024, layers)
    # Every other block reads the 32 states of the trunk, the others their own rows.
    across = 2 * linear(rows, inner, inner) + 2 * linear(32, WIDTH, inner) + 4 * rows * 32 * inner
    among = 4 * linear(rows, inner, inner) + 4 * rows**2 * inner
    each = linear(rows, inner, 4 * inner, inner) + linear(1, inner, 2 * inner)
    step = blocks // 2 * (across + among) + blocks * each + linear(1, 256, inner, inner) + linear(1, inner, 2 * inner)
    step += linear(7, STATE, inner) + linear(7, 2 * inner, inner, inner) + linear(1, STATE, 1024, inner)
    step += linear(rows, inner, 1024) + linear(7, 1024, 1024, STATE)
    return {
        "vision": qwen_3_tower(2, 8, depth, deepstack),
        "projector": 2 * linear(64, 4 * 1024, 4 * 1024, WIDTH),
        "sampler": sampler(2, tokens, 64, WIDTH, WIDTH, STATE) if tokens < 64 else 0,
        # LeRobot asks for the logits of all tokens, and does not read them.
        "prefill": trunk + linear(length, WIDTH, 151936),
        "steps": 4 * step,
    }


def wall_x(tokens, layers, depth, full, steps=10):
    length, actions = 2 * (tokens + 2) + WORDS + AROUND["wall_x"], 32
    trunk = qwen(length, length, WIDTH, 11008, 2048, 256, layers)
    # Action tokens go through the other expert.
    trunk += layers * 3 * (linear(actions, WIDTH, 2048) - linear(actions, WIDTH, 11008))
    head = linear(actions, 2 * 20, WIDTH) + linear(actions, 2 * WIDTH, WIDTH, WIDTH) + linear(actions, WIDTH, 20)
    return {
        "vision": qwen_2_5_tower(2, 9, depth, full),
        "projector": 2 * linear(81, 4 * 1280, 4 * 1280, WIDTH),
        "sampler": sampler(2, tokens, 81, WIDTH, WIDTH, 20) if tokens < 81 else 0,
        "prefill": steps * (trunk + head) + linear(1, 2 * 20, WIDTH),
        "steps": 0,
    }


FORMULAS = {"eo1": eo1, "vla_jepa": vla_jepa, "wall_x": wall_x}


def assert_costs(flops, expected):
    for stage, value in expected.items():
        assert flops[stage] == pytest.approx(value, rel=1e-3), stage


def test_they_cost_what_their_dimensions_say(family, monkeypatch):
    """With published widths and few layers; the kept rows below have all."""
    for sizes in (QWEN_2_5_VL_3B, QWEN_3_VL_2B):
        monkeypatch.setitem(sizes["text_config"], "num_hidden_layers", 2)
        monkeypatch.setitem(sizes["vision_config"], "depth", 2)
    monkeypatch.setitem(QWEN_2_5_VL_3B["vision_config"], "fullatt_block_indexes", [1])
    monkeypatch.setitem(QWEN_3_VL_2B["vision_config"], "deepstack_visual_indexes", [1])
    config, formula = architectures.make_config(family, 2), FORMULAS[family]
    if family == "vla_jepa":
        config.action_num_layers, config.enable_world_model = 2, False
        formula = partial(formula, blocks=2)
    policy = architectures.instantiate(config, "meta")
    batch = architectures.make_batch(policy, WORDS, "meta")
    cells = get_family(family).layout(policy).num_dense_tokens
    with KnownValues():
        assert_costs(count_flops(policy, batch), formula(cells, 2, 2, 1))
        wrapped = compress(policy, 16)
        assert_costs(count_flops(wrapped, batch), formula(16, 2, 2, 1))
        assert prefix_length(wrapped, batch) == 2 * (16 + 2) + WORDS + AROUND[family]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kept_rows_are_those_of_the_published_depths(name):
    kept = {line["name"]: line for line in lines("bench") if line["policy"] == name}
    assert set(kept) == {"dense", "K=16"}
    depths = (28, 24, 3) if name == "vla_jepa" else (36, 32, 4)
    for line in kept.values():
        assert_costs(line["flops"], FORMULAS[name](line["visual_tokens"], *depths))


# Parameters that the Hub counts in Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen3-VL-2B-Instruct.
@pytest.mark.parametrize(
    ("config", "model", "sizes", "parameters"),
    [
        (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, QWEN_2_5_VL_3B, 3_754_622_976),
        (Qwen3VLConfig, Qwen3VLForConditionalGeneration, QWEN_3_VL_2B, 2_127_532_032),
    ],
)
def test_the_published_sizes_have_the_published_parameters(config, model, sizes, parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in model(config(**sizes)).parameters()) == parameters


def test_lerobot_has_the_same_sizes_of_qwen3():
    theirs, ours = groot_n1_7._cosmos_reason2_qwen3_vl_config(), Qwen3VLConfig(**QWEN_3_VL_2B)
    for part in ("vision_config", "text_config"):
        for name in QWEN_3_VL_2B[part]:
            assert getattr(getattr(ours, part), name) == getattr(getattr(theirs, part), name), name
