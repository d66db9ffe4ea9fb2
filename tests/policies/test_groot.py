"""GR00T: its processors, its cameras, its own precision, and what it does not fetch."""

import copy
from contextlib import nullcontext

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from driving import act, loss_of, run, wrap
from lerobot_grids.looks.points import points_of
from lerobot_grids.policies.loaded import flow_steps, set_flow_steps
from lerobot_grids.profiling import architectures
from lerobot_grids.profiling.known_values import KnownValues
from lerobot_grids.profiling.measure import count_flops, prefix_length
from lerobot_policy_grids import GridsPolicy, compress
from lerobot_policy_grids.checkpoint import build
from lerobot_policy_grids.checkpoint.save import save_policy, save_processors
from lerobot_policy_grids.errors import CheckpointError, TokenGridError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.groot import _encoding
from lerobot_policy_grids.processor_grids import make_processors

pytest.importorskip("tree", reason="GR00T needs dm-tree")


@pytest.fixture(scope="module")
def groot(tmp_path_factory):
    """A policy with cameras that are not in alphabetical order."""
    inputs = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)) for name in ("wrist", "top")}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    torch.manual_seed(0)
    return get_family("groot").small(inputs, outputs, tmp_path_factory.mktemp("groot")).eval()


def prompts(policy, *tasks, images=None):
    """A batch as LeRobot's pre-processor writes it, and both processors."""
    from lerobot.policies.groot.processor_groot import _build_n1_7_processor

    pre, post = make_processors(policy.config)
    pre.steps[3]._proc = _build_n1_7_processor(policy._groot_model.config.model_name)
    torch.manual_seed(1)
    raw = {key: torch.rand(len(tasks), *f.shape) for key, f in policy.config.image_features.items()}
    raw |= {"observation.state": torch.randn(len(tasks), 4), "action": torch.randn(len(tasks), 8, 4)}
    return pre(raw | {"task": list(tasks)} | (images or {})), pre, post


@pytest.fixture(scope="module")
def batch(groot):
    return prompts(groot, "push", "lift a cup")[0]


def test_chunks_in_real_time_are_the_dense_ones(groot, batch):
    """LeRobot's real-time chunking begins with what is left of the last chunk."""
    policy = copy.deepcopy(groot)
    policy.config.rtc_config = RTCConfig(enabled=True, execution_horizon=6)
    options = {"inference_delay": 2, "prev_chunk_left_over": torch.randn(2, 6, 4)}
    chunks = []
    for each in (policy, wrap(policy, 64)):
        torch.manual_seed(4)
        assert each.supports_rtc()
        # LeRobot calls it where it is there.
        assert not hasattr(each, "init_rtc_processor")
        chunks.append(each.predict_action_chunk(dict(batch), **options))
    torch.testing.assert_close(*chunks, atol=1e-5, rtol=0)
    assert (chunks[0] - act(groot, batch)).abs().max() > 1e-2


def test_at_all_tokens_it_is_the_dense_policy_in_its_own_precision(groot, batch):
    """bfloat16 under LeRobot's own autocast, with a prompt that is padded."""
    policy = copy.deepcopy(groot)
    policy.config.use_bf16 = True
    assert not batch["attention_mask"].all()
    assert not any(name.startswith("observation.images") for name in batch)
    loss, chunk, gradients = run(policy, batch)
    wrapped = wrap(policy, 64)
    loss_k, chunk_k, gradients_k = run(wrapped, batch)
    assert torch.equal(loss_k, loss)
    assert torch.equal(chunk_k, chunk)
    # Tokens of two cameras are put together again, and gradients of parts of a batch added.
    torch.testing.assert_close(gradients_k, gradients, atol=2e-2, rtol=0)
    wrapped.num_tokens = 4
    assert not torch.equal(loss_of(wrapped, batch), loss)


def test_cameras_are_in_the_order_of_the_pre_processor(groot):
    assert list(groot.config.image_features) == ["observation.images.wrist", "observation.images.top"]
    assert get_family("groot").layout(groot).cameras == ("observation.images.top", "observation.images.wrist")


def test_a_prompt_without_a_camera_is_named(groot):
    policy = copy.deepcopy(groot)
    one = {"observation.images.top": policy.config.input_features["observation.images.top"]}
    few = copy.deepcopy(policy)
    few.config.input_features = one | {"observation.state": policy.config.input_features["observation.state"]}
    with pytest.raises(TokenGridError, match="2 samples of 2 cameras have 2 images"):
        act(wrap(policy, 4), prompts(few, "push", "lift a cup")[0])


@pytest.mark.parametrize("letterbox", [False, True])
def test_a_point_is_where_the_pre_processor_put_the_pixels(groot, letterbox):
    """A mark in the camera's image, after LeRobot stretched or padded the image and cut its border away."""
    policy = copy.deepcopy(groot)
    step = _encoding(policy.config)
    step.letter_box_transform = letterbox
    image = torch.zeros(1, 1, 1, 48, 64, 3, dtype=torch.uint8)
    row, column = 30, 20
    image[..., row - 2 : row + 2, column - 2 : column + 2, :] = 255
    ((seen,),) = step._build_sample_images(image, 1, None)
    light = seen.sum(0).double()
    y, x = (
        (axis * light).sum() / light.sum() for axis in torch.meshgrid(*[torch.arange(256) + 0.5] * 2, indexing="ij")
    )
    wrapped = wrap(policy, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lerobot_policy_grids.families.groot._encoding", lambda config: step)
        points = points_of(wrapped, 0, torch.tensor([[x / 256, y / 256]]).numpy(), (48, 64))
        region = get_family("groot").image_region(policy, 48, 64)
    assert points.in_camera()[0] == pytest.approx([column / 64, row / 48], abs=0.01)
    assert not points.in_padding().any()
    assert region == (
        (0, 0, 1, 1) if not letterbox else (0, pytest.approx(0.082, abs=0.001), 1, pytest.approx(0.917, abs=0.001))
    )


def test_reloaded_processors_are_linked_as_for_the_dense_policy(groot, tmp_path):
    """LeRobot links the step that decodes relative actions to the one that saw the state, by its type."""
    wrapped = wrap(copy.deepcopy(groot), 4)
    save_policy(wrapped, tmp_path)
    save_processors(tmp_path, *make_processors(groot.config))
    # As lerobot-train says them for every policy; GR00T has no such steps.
    overrides = {"normalizer_processor": {"stats": {}}, "device_processor": {"device": "cpu"}}
    for config in (groot.config, wrapped.config):
        pre, post = make_pre_post_processors(config, pretrained_path=str(tmp_path), preprocessor_overrides=overrides)
        assert post.steps[0].pack_step is pre.steps[2]
    chunk = torch.rand(2, 8, 8) * 2 - 1
    assert torch.equal(post(chunk), chunk[..., :4])


def test_weights_that_are_loaded_afterwards_are_not_read(groot, batch, tmp_path, monkeypatch):
    from lerobot.policies.groot import groot_n1_7

    def fetch(*args, **kwargs):
        raise OSError("the Hub")

    wrapped = wrap(copy.deepcopy(groot), 4)
    chunk = act(wrapped, batch)
    save_policy(wrapped, tmp_path)
    monkeypatch.setattr(groot_n1_7.GR00TN17, "from_pretrained", fetch)
    loaded = GridsPolicy.from_pretrained(tmp_path)
    assert torch.equal(act(loaded, batch), chunk)
    with pytest.raises(CheckpointError, match=r"cannot be read or downloaded \(the Hub"):
        build(groot.config, fresh=True)


def test_its_steps_can_be_set_where_the_checkpoint_decides(groot, batch):
    policy = copy.deepcopy(groot)
    policy.config.num_inference_timesteps = None
    get_family("groot").stages(policy)
    assert policy.config.num_inference_timesteps is None
    assert flow_steps(policy) == 3
    calls = []
    policy._groot_model.action_head.action_decoder.register_forward_hook(lambda *args: calls.append(1))
    set_flow_steps(policy, 5)
    act(policy, batch)
    assert len(calls) == 5


def test_flops_are_counted_without_values(groot, monkeypatch):
    """On the meta device as many as with values, where attention is the products that the counter knows."""
    monkeypatch.setattr(architectures, "STATE_SIZE", 4)
    counted = []
    for place in ("cpu", "meta"):
        policy = copy.deepcopy(groot).to(place)
        get_family("groot").finish(policy)
        wrapped = compress(policy, 16)
        batch = architectures.make_batch(policy, 12, place)
        # The number of steps is then the checkpoint's.
        policy.config.num_inference_timesteps = 3 if place == "cpu" else None
        with sdpa_kernel(SDPBackend.MATH), KnownValues() if place == "meta" else nullcontext():
            counted.append((prefix_length(wrapped, batch), count_flops(wrapped, batch)))
        assert policy.config.num_inference_timesteps == (3 if place == "cpu" else None)
        assert flow_steps(policy) == 3
    assert counted[0] == counted[1]
    assert counted[0][0] == 2 * (16 + 2) + 12
    assert all(count > 0 for count in counted[0][1].values())
