"""Families whose visual tokens go into placeholders of the prompt: positions, processors, what must be installed."""

from contextlib import contextmanager

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors

from driving import ROUNDING, act, loss_of, train_offsets, wrap
from lerobot_grids.policies.loaded import set_flow_steps
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint import build
from lerobot_policy_grids.checkpoint.save import save_policy, save_processors
from lerobot_policy_grids.errors import CheckpointError, TokenGridError, UnsupportedPolicyError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.evo1 import scattered_positions
from lerobot_policy_grids.families.qwen import Placed
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


def test_at_all_tokens_evo1_is_the_dense_policy_in_lerobots_own_autocast(evo1, monkeypatch):
    """On a GPU LeRobot runs the vision tower in it, too."""
    monkeypatch.setattr(type(evo1), "_maybe_autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    torch.manual_seed(0)
    batch = {"observation.images.top": torch.rand(2, 3, 64, 64), "observation.state": torch.randn(2, 8)}
    batch["task"] = ["push", "pull"]
    expected = act(evo1, batch)
    wrapped = wrap(evo1, 64)
    found = act(wrapped, batch)
    wrapped.detach()
    assert torch.equal(found, expected)


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


@pytest.fixture(scope="module")
def make_eo1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eo1")

    def make(*shapes, **options):
        inputs = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, *s)) for i, s in enumerate(shapes)}
        inputs["observation.state"] = INPUTS["observation.state"]
        torch.manual_seed(0)
        return get_family("eo1").small(inputs, OUTPUTS, folder, chunk_size=2, n_action_steps=2, **options).eval()

    return make


@contextmanager
def fixed_noise(policy):
    """In this block every sample begins with the same noise."""
    flow = policy.base.model
    flow.sample_noise = lambda shape, device: (
        torch.linspace(-1, 1, shape[1] * shape[2]).view(1, *shape[1:]).repeat(shape[0], 1, 1)
    )
    yield
    del flow.sample_noise


def prompts(policy, *tasks, actions=True):
    """A batch as LeRobot's pre-processor writes it: padded on the right for training, on the left for acting."""
    torch.manual_seed(1)
    raw = {key: torch.rand(len(tasks), *f.shape) for key, f in policy.config.image_features.items()}
    raw |= {"observation.state": torch.randn(len(tasks), 4), "task": list(tasks)}
    if actions:
        raw["action"] = torch.randn(len(tasks), 2, 4)
        raw["action_is_pad"] = torch.tensor([[False, True]] * len(tasks))
    return make_processors(policy.config)[0](raw)


@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (90, 60), (240, 320)])
def test_the_grid_is_the_one_of_qwens_image_processor(make_eo1, shape):
    policy = make_eo1(shape, shape)
    batch = prompts(policy, "push")
    assert (batch["image_grid_thw"] == batch["image_grid_thw"][0]).all()
    grid = batch["image_grid_thw"][0, 1:] // 2
    assert get_family("eo1").layout(policy).token_grid == tuple(grid.tolist())


def test_cameras_with_different_grids_are_refused(make_eo1):
    with pytest.raises(
        UnsupportedPolicyError, match=r"'observation\.images\.0' 8 x 8, 'observation\.images\.1' 5 x 11; rec"
    ):
        wrap(make_eo1((64, 64), (48, 96)), 4)


def test_an_image_of_another_size_is_named(make_eo1):
    wrapped = wrap(make_eo1((64, 64)), 4)
    batch = prompts(make_eo1((48, 96)), "push")
    with pytest.raises(TokenGridError, match=r"grids of patches \[\[1, 10, 22\]\], expected \[1, 16, 16\]; send"):
        act(wrapped, batch)


@pytest.mark.parametrize("position_ids", ["dense", "consecutive"])
@pytest.mark.parametrize("padding_counts", [True, False])
def test_at_all_tokens_a_padded_prompt_is_the_dense_one(make_eo1, position_ids, padding_counts):
    """Also where LeRobot masks padded actions only after the prompt was cut."""
    policy = make_eo1((48, 96), supervise_padding_actions=padding_counts)
    training, acting = prompts(policy, "push", "lift a cup"), prompts(policy, "push", "lift a cup", actions=False)
    assert not training["attention_mask"].all()
    loss, chunk = loss_of(policy, training), act(policy, acting)
    wrapped = wrap(policy, 5 * 11, position_ids=position_ids)
    assert torch.equal(loss_of(wrapped, training), loss)
    assert torch.equal(act(wrapped, acting), chunk)
    few = train_offsets(wrap(wrapped.detach(), 4, position_ids=position_ids))
    # With fewer, too, what pads another sample's prompt changes nothing.
    padded = acting["attention_mask"][0].argmax()
    alone = {name: value[:1] for name, value in acting.items() if isinstance(value, torch.Tensor)}
    alone |= {name: alone[name][:, padded:] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    alone |= {"pixel_values": acting["pixel_values"][: len(acting["pixel_values"]) // 2]}
    alone |= {name: acting[name] for name in ("state_token_id", "action_token_id")}
    assert torch.equal(alone["image_grid_thw"], acting["image_grid_thw"][:1])
    with fixed_noise(few):
        torch.testing.assert_close(act(few, alone), act(few, acting)[:1], atol=ROUNDING, rtol=0)


def test_what_was_prepared_for_training_can_be_acted_on(make_eo1):
    """LeRobot pads the prompts of a batch on the other side then, and refuses to act on the first."""
    policy = make_eo1((64, 64))
    training, acting = prompts(policy, "push", "lift a cup"), prompts(policy, "push", "lift a cup", actions=False)
    with pytest.raises(ValueError, match="same action token mask"):
        act(policy, training)
    turned = get_family("eo1").acting(training)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(turned[name], acting[name]), name
        assert torch.equal(get_family("eo1").acting(acting)[name], acting[name]), name
    assert torch.equal(act(policy, turned), act(policy, acting))


def placed(token_grid, coordinates, dense):
    """A prompt of a word, an image and two words, another image and a word; its dense positions, by Qwen's rule."""
    height, width = token_grid
    cells, rows = height * width, torch.arange(height).repeat_interleave(width)
    image = torch.stack([torch.zeros(cells), rows, torch.arange(width).repeat(height)])
    word, span = torch.zeros(3, 1), max(height, width)
    parts = [word, image + 1, word + 1 + span, word + 2 + span, image + 3 + span, word + 3 + 2 * span]
    positions = torch.cat(parts, dim=1).long()[:, None]
    is_image = torch.tensor([[False, *[True] * cells, False, False, *[True] * cells, False]])
    left = torch.cat([torch.arange(cells) < c.shape[1] for c in coordinates])
    keep = (~is_image).masked_scatter(is_image, left)
    ids = torch.zeros_like(is_image, dtype=torch.long)
    grids = torch.zeros(2, 3)
    return Placed(ids, ids, ids, grids, keep, is_image, token_grid, coordinates, dense), positions


def test_positions_are_read_where_tokens_are():
    """The dense positions of the image, sampled by torch at the same coordinates."""
    torch.manual_seed(0)
    height, width = 5, 7
    coordinates = [torch.rand(1, 4, 2), torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])]
    where, positions = placed((height, width), coordinates, dense=True)
    numbered = where.number(positions)
    assert numbered.shape == (3, 1, 1 + 4 + 2 + 2 + 1)
    images = positions[:, where.is_image].view(3, 2, height, width).float()
    start = 1
    for camera, points in enumerate(coordinates):
        sampled = torch.nn.functional.grid_sample(
            images[:, camera][None], 2 * points[:, None] - 1, align_corners=False, padding_mode="border"
        )
        end = start + points.shape[1]
        torch.testing.assert_close(numbered[:, 0, start:end], sampled[0, :, 0], atol=1 / 256, rtol=0)
        start = end + 2
    words = where.cut(~where.is_image)[0]
    assert torch.equal(numbered[:, 0, words], positions[:, 0, ~where.is_image[0]].float())


def test_consecutive_positions_are_those_of_a_smaller_image():
    """4 of 8 x 8 tokens in the middles of four parts of the image, as an image of 2 x 2 cells has them."""
    middles = torch.tensor([[[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]])
    where, positions = placed((8, 8), [middles, middles], dense=False)
    small, expected = placed((2, 2), [middles, middles], dense=True)
    assert torch.equal(where.number(positions), small.number(expected))
    assert torch.equal(small.number(expected), expected.float())


def test_a_camera_without_tokens_moves_nothing_that_is_dense():
    nothing = torch.zeros(1, 0, 2)
    where, positions = placed((4, 4), [nothing, nothing], dense=True)
    assert where.number(positions)[0, 0].tolist() == [0, 5, 6, 11]


def test_weights_that_are_loaded_afterwards_are_not_fetched(make_eo1, monkeypatch, tmp_path):
    from lerobot.policies.eo1 import modeling_eo1

    def fetch(*args, **kwargs):
        raise OSError("the Hub")

    monkeypatch.setattr(modeling_eo1.Qwen2_5_VLForConditionalGeneration, "from_pretrained", fetch)
    policy = make_eo1((64, 64))
    assert policy.config.pretrained_path is None
    save_policy(policy, tmp_path / "dense")
    save_processors(tmp_path / "dense", *make_processors(policy.config))
    wrap(policy, 4).save_pretrained(tmp_path / "grids")
    assert build(policy.config).config.pretrained_path is None
    assert GridsPolicy.from_pretrained(tmp_path / "grids").base.config.pretrained_path is None
    with pytest.raises(CheckpointError, match=r"cannot be read or downloaded \(the Hub"):
        build(policy.config, fresh=True)
