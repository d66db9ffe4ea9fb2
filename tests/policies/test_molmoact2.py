"""MolmoAct2: its padded prompts, its cameras, what it refuses, its sizes and what it does not fetch."""

import copy
from contextlib import nullcontext

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from driving import act, loss_of, train_offsets, wrap
from lerobot_grids.policies.loaded import flow_steps, set_flow_steps
from lerobot_grids.preflight.robot import _fixed_width_faults
from lerobot_grids.profiling import architectures
from lerobot_grids.profiling.known_values import KnownValues
from lerobot_grids.profiling.measure import count_flops, prefix_length
from lerobot_policy_grids import GridsPolicy, compress
from lerobot_policy_grids.checkpoint import build
from lerobot_policy_grids.checkpoint.save import save_policy
from lerobot_policy_grids.errors import CheckpointError, TokenGridError, UnsupportedPolicyError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.base import width_faults
from lerobot_policy_grids.families.molmoact2 import _Cut, _dense_positions, _distance, _rotate
from lerobot_policy_grids.processor_grids import make_processors

# Bytes of the weights that Ai2 publishes for LeRobot, in bfloat16, and of the longest table of contents before them.
FILE, CONTENTS = 10_884_573_720, 2**18


@pytest.fixture(scope="module")
def molmoact2(tmp_path_factory):
    """A policy with cameras that are not in alphabetical order, of three shapes."""
    shapes = {"wrist": (48, 64), "top": (64, 64), "side": (60, 40)}
    inputs = {f"observation.images.{k}": PolicyFeature(FeatureType.VISUAL, (3, *shape)) for k, shape in shapes.items()}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    torch.manual_seed(0)
    return get_family("molmoact2").small(inputs, outputs, tmp_path_factory.mktemp("molmoact2")).eval()


def prompts(policy, *tasks, without=()):
    """A batch as LeRobot's pre-processor writes it."""
    torch.manual_seed(1)
    raw = {key: torch.rand(len(tasks), *f.shape) for key, f in policy.config.image_features.items()}
    raw |= {"observation.state": torch.randn(len(tasks), 4), "action": torch.randn(len(tasks), 8, 4)}
    raw |= {"task": list(tasks), "action_is_pad": torch.zeros(len(tasks), 8, dtype=torch.bool)}
    return make_processors(policy.config)[0]({k: v for k, v in raw.items() if k.rpartition(".")[-1] not in without})


@pytest.fixture(scope="module")
def batch(molmoact2):
    return prompts(molmoact2, "push", "lift a cup")


def answered(policy, batch):
    """The batch and a policy that also learns to write actions as tokens, behind the prompt."""
    sizes = policy._backbone().config
    policy.config.action_mode = "both"
    start, end = sizes.action_start_token_id, sizes.action_end_token_id
    answers = torch.tensor([[start, sizes.action_token_start_id + bin, end, sizes.eos_token_id] for bin in (2, 7)])
    nothing = torch.zeros_like(answers)
    behind = {"input_ids": answers, "attention_mask": nothing + 1, "token_type_ids": nothing.bool()}
    whole = {name: torch.cat([batch[name], values], dim=1) for name, values in behind.items()}
    labels = torch.cat([torch.full_like(batch["input_ids"], -100), answers], dim=1)
    return {**batch, **whole, "labels": labels}


@pytest.mark.parametrize("position_ids", ["dense", "consecutive"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_all_tokens_a_padded_prompt_is_the_dense_one(molmoact2, batch, position_ids, dtype):
    """With labels behind the prompt, and in bfloat16 under LeRobot's own autocast."""
    policy = copy.deepcopy(molmoact2)
    if dtype == "bfloat16":
        get_family("molmoact2").to_bfloat16(policy)
    assert not batch["attention_mask"].all()
    learning = answered(policy, batch)
    loss, chunk = loss_of(policy, learning), act(policy, batch)
    wrapped = wrap(policy, 64, position_ids=position_ids)
    assert torch.equal(loss_of(wrapped, learning), loss)
    assert torch.equal(act(wrapped, batch), chunk)
    wrapped.num_tokens = 4
    assert not torch.equal(loss_of(wrapped, learning), loss)
    assert not torch.equal(act(wrapped, batch), chunk)


def test_a_reducer_does_not_see_the_answer(molmoact2, batch):
    policy = copy.deepcopy(molmoact2)
    learning = answered(policy, batch)
    wrapped = train_offsets(wrap(policy, 4))
    wrapped.seam.remember_coordinates()
    other = {**learning, "input_ids": learning["input_ids"].flip(0), "labels": learning["labels"].flip(0)}
    other["input_ids"][:, :-4] = learning["input_ids"][:, :-4]
    assert not torch.equal(loss_of(wrapped, learning), loss_of(wrapped, other))
    seen = wrapped.seam.coordinates
    # When it acts there is none.
    act(wrapped, batch)
    for ours, theirs in zip(seen, wrapped.seam.coordinates, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_a_camera_the_others_are_told_apart(molmoact2, batch):
    """LeRobot then writes the images into the prompt by name, and otherwise as they are configured."""
    policy = copy.deepcopy(molmoact2)
    names = [f"observation.images.{name}" for name in ("wrist", "top", "side")]
    assert list(get_family("molmoact2").layout(policy).cameras) == names
    few = prompts(policy, "push", "lift a cup", without=("top",))
    chunk = act(policy, few)
    whole = wrap(policy, 64)
    assert torch.equal(act(whole, few), chunk)
    policy = whole.detach()
    wrapped = train_offsets(wrap(policy, 4, condition_on=("camera",)))
    wrapped.seam.remember_coordinates()
    act(wrapped, batch)
    wrist, _, side = wrapped.seam.coordinates
    act(wrapped, few)
    for seen, expected in zip(wrapped.seam.coordinates, (wrist, side), strict=True):
        torch.testing.assert_close(seen, expected)


def test_other_grids_and_column_tokens_are_named(molmoact2, batch):
    wrapped = wrap(copy.deepcopy(molmoact2), 4)
    grids, ids = batch["image_grids"].clone(), batch["input_ids"].clone()
    grids[:, 2:] = 8
    with pytest.raises(TokenGridError, match=r"grids of tokens \[\[8, 8, 8, 8\]\], expected \[8, 8, 0, 0\] without"):
        act(wrapped, batch | {"image_grids": grids})
    ids[0, -1] = wrapped.base._backbone().config.image_col_id
    with pytest.raises(TokenGridError, match=r"\[\[8, 8, 0, 0\]\], with column tokens, expected"):
        act(wrapped, batch | {"input_ids": ids})
    with pytest.raises(TokenGridError, match="2 samples of 2 cameras have 6 images"):
        act(wrapped, {name: value for name, value in batch.items() if not name.endswith("top")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_knowledge_insulation": True}, "a reducer would not learn from them; set it to false"),
        ({"action_mode": "discrete"}, "action_mode=discrete: .* acts by its flow only; set action_mode=continuous"),
        ({"inference_action_mode": "discrete"}, "set inference_action_mode=continuous"),
        ({"norm_tag": "droid"}, "norm_tag=droid: .* name them in that order in image_keys"),
        ({"image_keys": ["observation.images.front"]}, "image_keys has observation.images.front, and the cameras in"),
    ],
)
def test_what_it_cannot_do_is_refused(molmoact2, options, message):
    policy = copy.deepcopy(molmoact2)
    for name, value in options.items():
        setattr(policy.config, name, value)
    with pytest.raises(UnsupportedPolicyError, match=message) as error:
        wrap(policy, 4)
    assert "\n" not in str(error.value)


def test_it_acts_by_its_flow_where_nothing_is_said(molmoact2, batch):
    policy = copy.deepcopy(molmoact2)
    policy.config.inference_action_mode = None
    wrapped = wrap(policy, 64)
    assert torch.equal(act(wrapped, batch), act(molmoact2, batch))
    with pytest.raises(UnsupportedPolicyError, match="by its flow only"):
        wrapped.predict_action_chunk(dict(batch), inference_action_mode="discrete")


def test_chunks_in_real_time_are_the_dense_ones(molmoact2, batch):
    """LeRobot's real-time chunking has a loop of its own, which begins with the last chunk."""
    policy = copy.deepcopy(molmoact2)
    policy.config.rtc_config = RTCConfig(enabled=True)
    policy.init_rtc_processor()
    before = torch.randn(2, 8, 32)
    options = {"inference_delay": 2, "prev_chunk_left_over": before, "execution_horizon": 6}
    chunks = []
    for each in (policy, wrap(policy, 64, position_ids="dense")):
        torch.manual_seed(4)
        chunks.append(each.predict_action_chunk(dict(batch), **options))
    assert torch.equal(*chunks)
    # Another loop, or another start, gives other actions.
    assert not torch.equal(chunks[0], act(molmoact2, batch))


def test_a_policy_that_was_trained_acts_with_its_new_weights(molmoact2, batch):
    """LeRobot keeps what it makes of the steps' times, and would use it with other weights."""
    wrapped = wrap(copy.deepcopy(molmoact2), 4)
    act(wrapped, batch)
    wrapped.train()
    loss_of(wrapped, batch).backward()
    torch.optim.SGD(wrapped.parameters(), lr=0.1).step()
    wrapped.eval()
    other = wrap(copy.deepcopy(molmoact2), 4)
    other.load_state_dict(wrapped.state_dict())
    # What it was copied from may have acted.
    other.base._action_expert()._modulation_cache_key = None
    assert torch.equal(act(wrapped, batch), act(other, batch))


def test_dense_positions_are_those_of_the_sequence_with_every_token():
    """Two images of 2 x 2 cells, of which one and two tokens are left, in prompts that are padded in front."""
    prompts = ["b<....>i<....>ww", "pb<....>i<....>w"]
    is_image = torch.tensor([[c == "." for c in prompt] for prompt in prompts])
    number = is_image.cumsum(1) - 1
    keep = ~is_image | (number == 0) | (number == 4) | (number == 5)
    # The middle of the lower right cell; the middle of the upper left one, and half way to its right neighbour.
    places = [torch.tensor([[[0.75, 0.75]]] * 2), torch.tensor([[[0.25, 0.25], [0.5, 0.25]]] * 2)]
    found = _dense_positions(_Cut(keep), is_image, places, (2, 2))
    # b 0, < 1, cells 2-5, > 6, i 7, < 8, cells 9-12, > 13, w 14, w 15
    assert found.tolist() == [
        [0, 1, 5, 6, 7, 8, 9, 9.5, 13, 14, 15],
        [0, 1, 2, 6, 7, 8, 9, 10, 10.5, 14, 15],
    ]


def test_fractions_of_positions_are_between_whole_ones(molmoact2):
    (rotary,) = [copy.deepcopy(molmoact2._backbone().transformer.rotary_emb)]
    places = torch.tensor([[0.0, 3.25, 700.5, 701.0]])
    cosines, sines = _rotate(rotary, _Cut(positions=places), torch.zeros(1, 4, 32), torch.arange(4)[None])
    frequencies = 1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angles = (places[..., None].double() * frequencies).repeat(1, 1, 2)
    torch.testing.assert_close(cosines.double(), angles.cos(), atol=1e-4, rtol=0)
    torch.testing.assert_close(sines.double(), angles.sin(), atol=1e-4, rtol=0)
    whole, _ = rotary(torch.zeros(1, 702, 32), torch.arange(702)[None])
    assert torch.equal(cosines[0, [0, 3]], whole[0, [0, 701]])


def test_the_distance_is_of_the_entries_that_the_loss_reads():
    """Of a velocity of zeros it is the mean square of the other one, over real dimensions and steps of all times."""
    torch.manual_seed(0)
    velocity = torch.randn(2 * 3, 8, 32)
    steps, dims = torch.zeros(2, 8, dtype=torch.bool), torch.ones(2, 32, dtype=torch.bool)
    steps[1, 5:], dims[:, :4] = True, False
    batch = {"action": torch.zeros(2, 8, 32), "action_dim_is_pad": dims, "action_horizon_is_pad": steps}
    first, second = velocity[:3, :, :4], velocity[3:, :5, :4]
    expected = torch.cat([first.flatten(), second.flatten()]).square().mean()
    torch.testing.assert_close(_distance(velocity, torch.zeros_like(velocity), batch), expected)


def test_weights_that_are_loaded_afterwards_are_not_read(molmoact2, batch, tmp_path, monkeypatch):
    from lerobot.policies.molmoact2 import modeling_molmoact2

    def fetch(*args, **kwargs):
        raise OSError("the weights")

    wrapped = wrap(copy.deepcopy(molmoact2), 4, position_ids="dense")
    save_policy(wrapped, tmp_path)
    monkeypatch.setattr(modeling_molmoact2.MolmoAct2ForConditionalGeneration, "from_pretrained", fetch)
    loaded = GridsPolicy.from_pretrained(tmp_path)
    assert torch.equal(act(loaded, batch), act(wrapped, batch))
    with pytest.raises(CheckpointError, match=r"cannot be read or downloaded \(the weights"):
        build(molmoact2.config, fresh=True)


def test_its_steps_can_be_set_where_the_checkpoint_decides(molmoact2, batch):
    policy = copy.deepcopy(molmoact2)
    policy.config.num_inference_steps = None
    assert flow_steps(policy) == 10
    calls = []
    policy._action_expert().final_layer.register_forward_hook(lambda *args: calls.append(1))
    set_flow_steps(policy, 5)
    act(policy, batch)
    assert len(calls) == 5


def test_flops_are_counted_without_values(molmoact2, monkeypatch):
    """On the meta device as many as with values, where attention is the products that the counter knows."""
    monkeypatch.setattr(architectures, "STATE_SIZE", 4)
    counted = []
    for place in ("cpu", "meta"):
        policy = copy.deepcopy(molmoact2).to(place)
        get_family("molmoact2").finish(policy)
        # It names kernels that the counter does not know on a CPU.
        policy._backbone().vision_backbone.image_pooling_2d.attn_implementation = "eager" if place == "cpu" else "sdpa"
        wrapped = compress(policy, 16)
        batch = architectures.make_batch(policy, 12, place)
        with sdpa_kernel(SDPBackend.MATH), KnownValues() if place == "meta" else nullcontext():
            counted.append((prefix_length(wrapped, batch), count_flops(wrapped, batch)))
    assert counted[0] == counted[1]
    assert counted[0][0] == 3 * (16 + 2) + 12
    assert all(count > 0 for count in counted[0][1].values())


def test_the_published_sizes_fill_the_published_file():
    config = architectures.make_config("molmoact2", cameras=2)
    policy = architectures.instantiate(config, "meta")
    assert get_family("molmoact2").layout(policy).token_grid == (14, 14)
    rest = FILE - sum(2 * value.numel() for value in policy.state_dict().values())
    # Each tensor has a line of at least 100 characters there.
    assert 100 * len(policy.state_dict()) < rest < CONTENTS
    assert config.checkpoint_path == "allenai/MolmoAct2"


def test_a_robot_with_other_widths_fits(molmoact2):
    """The state is written into the prompt, and actions are padded."""
    for state, action, expected in ((6, 6, 0), (80, 32, 0), (6, 33, 1)):
        widths = {"observation.state": state, "action": action}
        lines = width_faults("x", molmoact2.config, widths)
        assert len(lines) == expected
        assert all("33 dimensions, and x takes at most 32" in line for line in lines)
        assert _fixed_width_faults("x", molmoact2.config, widths) == []
