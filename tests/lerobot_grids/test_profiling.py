"""Counted FLOPs against closed formulas, and the command that shows them."""

import itertools
import json
from contextlib import ExitStack

import pytest
import torch

from formulas import gemma, linear, sampler, siglip
from lerobot_grids.policies import set_flow_steps
from lerobot_grids.profiling.architectures import instantiate, make_batch, make_config, precision
from lerobot_grids.profiling.bench import bench
from lerobot_grids.profiling.measure import count_flops, measure_latency, prefix_length
from lerobot_grids.profiling.roofline import Card
from lerobot_grids.profiling.stopwatch import Timed, within
from lerobot_grids.profiling.work import WorkCounter
from lerobot_grids_cli.main import main
from lerobot_policy_grids import compress
from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError
from lerobot_policy_grids.reducers import reducer_config


def pi0(cameras, k, dense=256, language=48, chunk=50, steps=10):
    prefix = cameras * k + language
    once = linear(1, 32, 1024)
    step = gemma(chunk + 1, prefix + chunk + 1, 1024, 4096) + linear(1, 32, 1024)
    step += linear(chunk, 32, 1024) + linear(chunk, 2048, 1024, 1024) + linear(chunk, 1024, 32)
    return {
        "vision": siglip(cameras),
        "projector": linear(cameras * k, 1152, 2048),
        "sampler": sampler(cameras, k, cameras=cameras) if k < dense else 0,
        "prefill": gemma(prefix, prefix, 2048, 16384),
        "steps": steps * step,
    } | {"once": once}


@pytest.fixture(scope="module", params=[2, 3])
def pi0_on_meta(request):
    return request.param, instantiate(make_config("pi0", request.param), "meta")


@pytest.fixture(scope="module")
def pi0_costs(pi0_on_meta):
    """{K: (FLOPs by stage, tokens of the prefix)}; all 256 are those of the dense policy."""
    _, policy = pi0_on_meta
    batch, costs = make_batch(policy, 48, "meta"), {}
    for k in (256, 16, 1):
        measured = policy if k == 256 else compress(policy, k)
        costs[k] = count_flops(measured, batch), prefix_length(measured, batch)
        if measured is not policy:
            measured.detach()
    return costs


@pytest.mark.parametrize("k", [256, 16, 1])
def test_pi0_costs_what_its_dimensions_say(pi0_on_meta, pi0_costs, k):
    cameras, _ = pi0_on_meta
    flops, length = pi0_costs[k]
    expected = pi0(cameras, k)
    assert length == cameras * k + 48
    for stage, value in flops.items():
        assert value == pytest.approx(expected[stage], rel=1e-3), stage


@pytest.mark.parametrize("after", [9])
def test_later_layers_of_pi0_cost_what_their_tokens_say(pi0_on_meta, after):
    cameras, policy = pi0_on_meta
    measured = compress(policy, reducer=reducer_config("grids", num_tokens=16, sample_after_layer=after))
    try:
        flops = count_flops(measured, make_batch(policy, 48, "meta"))
    finally:
        measured.detach()
    later = siglip(cameras, tokens=16, layers=27 - after) - siglip(cameras, tokens=16, layers=0)
    expected = pi0(cameras, 16) | {"vision": siglip(cameras, layers=after) + later}
    for stage, value in flops.items():
        assert value == pytest.approx(expected[stage], rel=1e-3), stage


# GFLOPs of the whole policy by an independent count: meta tensors, uniform sampling, no sampler. Dense, and K=16.
TOTALS = {("pi0", 2): (3073.0, 1086.8), ("pi0", 3): (4379.1, 1370.9), ("pi05", 2): (3707.2, 1700.2)}


def assert_totals(family, cameras, full, sixteen):
    """Of FLOPs by stage."""
    dense, reduced = TOTALS[family, cameras]
    total = sum(sixteen.values())
    assert sum(full.values()) / 1e9 == pytest.approx(dense, rel=0.01)
    assert (total - sixteen["sampler"]) / 1e9 == pytest.approx(reduced, rel=0.01)
    assert 0 < sixteen["sampler"] < 0.005 * total


def test_whole_policy_totals(pi0_on_meta, pi0_costs):
    cameras, _ = pi0_on_meta
    assert_totals("pi0", cameras, pi0_costs[256][0], pi0_costs[16][0])


def test_bench_totals():
    full, sixteen = bench("pi05", [16], cameras=2).costs
    assert_totals("pi05", 2, full.flops, sixteen.flops)
    assert [cost.total_flops for cost in (full, sixteen)] == [sum(cost.flops.values()) for cost in (full, sixteen)]
    assert (full.visual_tokens, sixteen.visual_tokens) == (256, 16)


def test_decoding_steps_grow_with_what_they_attend_to():
    policy = instantiate(make_config("pi0_fast", 1), "meta")
    batch = make_batch(policy, 32, "meta")
    policy.config.max_decoding_steps = 9
    predicted = count_flops(policy, batch)["steps"]
    prefix = prefix_length(policy, batch)
    # The first step comes out of the prefill; each later one runs one token through the trunk, and every step
    # reads one row of logits.
    logits = linear(1, 2048, 257152)
    later = sum(gemma(1, prefix + t, 2048, 16384) for t in range(1, 9))
    assert predicted == pytest.approx(later + 9 * logits, rel=0.15)
    # Its steps are those of no flow.
    with pytest.raises(GridsError, match="the 'pi0_fast' policy integrates no flow; drop --num_steps"):
        set_flow_steps(policy, 1)


@pytest.mark.parametrize("name", ["evo1", "molmoact2", "pi0"])
def test_precision_is_that_of_most_weights(name):
    """Whatever a family's option for it is called."""
    for dtype in ("bfloat16", "float32"):
        assert precision(instantiate(make_config(name, 1, dtype=dtype), "meta")) == dtype


@pytest.mark.parametrize(("name", "size"), [("evo1", 448), ("molmoact2", 378)])
def test_some_see_images_of_one_size(name, size):
    with pytest.raises(UnsupportedPolicyError, match=f"sees images of {size} pixels, not 224; drop --resolution$"):
        make_config(name, 1, 224)


@pytest.mark.parametrize("k", [None, 16])
def test_evo1_costs_what_its_dimensions_say(k):
    """LeRobot fills up to three views with blank images; wrapped, they cost nothing."""
    policy = instantiate(make_config("evo1", 2), "meta")
    batch = make_batch(policy, 48, "meta")
    views, tokens = (3, 3 * 256) if k is None else (2, 2 * k)
    measured = policy if k is None else compress(policy, k)
    flops, length = count_flops(measured, batch), prefix_length(measured, batch)
    # "Image-1: <img></img>" and the end of a line, of each view, character by character.
    assert length == tokens + 3 * 12 + 48
    assert flops["vision"] == pytest.approx(siglip(views, 1025, 1024, 4096, layers=24), rel=1e-3)
    assert flops["projector"] == views * linear(256, 4096, 896, 896)
    attention = linear(length, 896, 896, 896) + 2 * linear(length, 896, 2 * 64) + 4 * length**2 * 896
    assert flops["prefill"] == pytest.approx(14 * (attention + 3 * linear(length, 896, 4864)), rel=1e-3)
    action = 4 * linear(50, 896, 896) + linear(50, 896, 4 * 896, 896) + 4 * 50 * (length + 1) * 896
    keys = 2 * linear(length + 1 - 50, 896, 896)
    assert flops["steps"] > 32 * 8 * (action + keys)
    assert flops["steps"] == pytest.approx(32 * 8 * (action + keys), rel=0.3)


def test_a_smaller_image_costs_what_its_tokens_say():
    policy = instantiate(make_config("pi0", 1, 112), "meta")
    vision = count_flops(policy, make_batch(policy, 48, "meta"))["vision"]
    assert vision == pytest.approx(siglip(1, tokens=64), rel=1e-3)


def test_a_smaller_image_is_shown_beside():
    costs = bench("tiny", [36], cameras=1, resolutions=[48]).costs
    assert [cost.name for cost in costs] == ["dense", "K=36", "dense at 48 px"]
    assert [cost.visual_tokens for cost in costs] == [144, 36, 36]
    small = instantiate(make_config("tiny", 1, 48), "cpu")
    assert costs[2].flops == count_flops(small, make_batch(small, 32, "cpu"))
    assert costs[2].flops["vision"] < costs[0].flops["vision"] / 4


def test_flow_steps_cost_alike_and_nothing_else():
    result = bench("tiny", [16], cameras=1, steps=[1, 4])
    assert [cost.name for cost in result.costs] == ["dense, 1 step", "dense, 4 steps", "K=16, 1 step", "K=16, 4 steps"]
    for one, four in itertools.batched(result.costs, 2):
        assert (one.num_steps, four.num_steps) == (1, 4)
        assert four.flops == one.flops | {"steps": 4 * one.flops["steps"]}
    with pytest.raises(GridsError, match="the 'act' policy integrates no flow; drop --num_steps"):
        bench("act", [16], cameras=1, steps=[1])


@pytest.mark.parametrize("steps", [1, 2])
def test_latency_is_split_into_stages_that_add_up(steps):
    policy = instantiate(make_config("tiny", 1), "cpu")
    policy.config.num_steps = steps
    batch = make_batch(policy, 8, "cpu")
    latency, p95 = measure_latency(compress(policy, 16), batch, warmup=1, repeats=3)
    stages = ("vision", "projector", "sampler", "prefill", "steps")
    assert sum(latency[name] for name in stages) == pytest.approx(latency["total"])
    # Measured around their modules; steps and prefill are differences, which a busy machine may turn negative.
    assert all(latency[name] > 0 for name in ("vision", "projector", "sampler"))
    assert p95 >= latency["total"]


def test_measuring_leaves_the_policy_as_it_was(grids_checkpoint):
    from lerobot_grids.policies import load

    policy = load(str(grids_checkpoint)).policy
    batch = make_batch(policy.base, 8, "cpu")
    batch["observation.state"] = batch["observation.state"][:, :4]
    noise = torch.randn(1, 16, 32)
    before = policy.predict_action_chunk(dict(batch), noise=noise)
    steps, attention = policy.base.config.num_steps, policy.family.stages(policy.base).vision.config
    attention = (attention, attention._attn_implementation)
    count_flops(policy, batch), prefix_length(policy, batch), measure_latency(policy, batch, 0, 1)
    assert policy.base.config.num_steps == steps
    assert attention[0]._attn_implementation == attention[1]
    assert torch.equal(policy.predict_action_chunk(dict(batch), noise=noise), before)


def test_the_command_prints_saves_and_draws(tmp_path, capsys):
    arguments = ["--policy=tiny", "--tokens=16,4", "--cameras=1", "--device=cpu", "--repeats=1", "--warmup=0"]
    arguments += ["--runtime=fast", "--precision=fp32"]
    outputs = [f"--json={tmp_path}/bench.json", f"--picture={tmp_path}/bench.png"]
    assert main(["bench", *arguments, *outputs]) == 0
    printed = capsys.readouterr().out
    assert "GFLOPs per stage" in printed
    assert "milliseconds per stage on" in printed
    saved = json.loads((tmp_path / "bench.json").read_text())
    dense, *reduced = saved["costs"]
    assert [cost["name"] for cost in reduced] == ["K=16", "K=16 fast fp32", "K=4", "K=4 fast fp32"]
    assert dense["total_flops"] > reduced[0]["total_flops"] > reduced[2]["total_flops"]
    for eager, fast in (reduced[:2], reduced[2:]):
        assert fast["flops"] == eager["flops"]
        assert set(fast["latency_ms"]) == {"prefill", "steps", "total"}
        assert eager["apart"] is None
        # 0.0 would be the eager path itself.
        assert 0 < fast["apart"] < 1e-5
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_is_measured_with_its_own_cameras(grids_checkpoint, tmp_path, capsys):
    assert main(["bench", f"--policy={grids_checkpoint}", "--tokens=16", f"--json={tmp_path}/bench.json"]) == 0
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert saved["cameras"] == 1
    assert [cost["visual_tokens"] for cost in saved["costs"]] == [144, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy=pi9"], "'pi9' is unknown"),
        (["--policy=tiny", "--tokens=0"], "not a list of positive numbers"),
        (["--policy=tiny", "--tokens=a,b"], "not a list of positive numbers"),
        (["--policy=tiny", "--tokens=145"], "12 x 12 = 144"),
        (["--policy=tiny", "--sample_after_layer=-1"], "not a list of numbers of layers"),
        (["--policy=tiny", "--sample_after_layer=2"], "tower has 1 layers; choose 0 .. 1"),
        (["--policy=tiny", "--resolution=100"], "set resize_imgs_with_padding to multiples of 8"),
        (["--policy=tiny", "--cameras=0"], "--cameras 0"),
        (["--policy=tiny", "--device=foo"], "device 'foo' is not available"),
        (["--policy=tiny", "--runtime=fast"], "changes times and no FLOPs; add --device"),
        (["--policy=tiny", "--device=cpu", "--precision=bf16"], "of the fast path; add --runtime fast"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bench_refuses(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


STAGES = ("vision", "prefill", "steps")


@pytest.mark.parametrize(("k", "milliseconds"), [(None, (1.11, 2.87, 1.52)), (16, (1.11, 0.92, 1.46))])
def test_the_bound_of_pi0_is_that_of_an_independent_roofline(k, milliseconds):
    """Vision, prefill and ten steps with two cameras, in ms; that roofline's steps also read keys and values."""
    dense = instantiate(make_config("pi0", 2), "meta")
    # One is enough: all are the same.
    dense.config.num_inference_steps = 1
    tower = dense.model.paligemma_with_expert.paligemma.model.vision_tower
    stages = [Timed(tower, "forward", "vision"), Timed(dense.model, "denoise_step", "steps")]
    policy = dense if k is None else compress(dense, k)
    counter = WorkCounter([*policy.parameters(), *policy.buffers()])
    with ExitStack() as stack:
        for timed in stages:
            stack.enter_context(within(timed, counter.within))
        stack.enter_context(torch.no_grad())
        stack.enter_context(counter)
        policy.predict_action_chunk(dict(make_batch(dense, 48, "meta")))
    # What was assumed of the card.
    card = Card("H200", {"float32": 60, "tf32": 395, "bfloat16": 790}, 4300, "assumed")
    vision, prefill, step = (1000 * card.seconds(counter.stages[name], tf32=True) for name in STAGES)
    assert (vision, prefill, 10 * step) == pytest.approx(milliseconds, rel=0.03)
