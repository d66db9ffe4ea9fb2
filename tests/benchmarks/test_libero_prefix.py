"""The stored prefix that LIBERO's small policy is trained on equals LeRobot's own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.smolvla.modeling_smolvla import make_att_2d_masks

from lerobot_policy_grids.tiny import TinySmolVLAConfig
from lerobot_policy_grids.tiny.modeling_tiny_smolvla import TinySmolVLAPolicy

FOLDER = str(Path(__file__).parents[2] / "benchmarks" / "libero")
FRAMES, WORDS = 3, 6


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    sys.path.insert(0, FOLDER)
    yield
    sys.path.remove(FOLDER)


@pytest.fixture(scope="module")
def policy() -> TinySmolVLAPolicy:
    torch.manual_seed(0)
    images = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)) for name in ("image", "image2")
    }
    config = TinySmolVLAConfig(
        input_features=images | {"observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        resize_imgs_with_padding=(96, 96),
        vision_tower="local",
        language_layers=4,
        device="cpu",
        push_to_hub=False,
    )
    return TinySmolVLAPolicy(config).eval()


@pytest.fixture(scope="module")
def frames(policy: TinySmolVLAPolicy, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Frames as `recorded.Frames` has them, and their images."""
    import prefix
    from prefix import see

    prefix.KEPT = tmp_path_factory.mktemp("seen")
    images = torch.randint(0, 256, (FRAMES, 2, 3, 96, 96), dtype=torch.uint8)
    assert torch.equal(see(policy, images), see(policy, images)), "the second comes from a file"
    assert len(list(prefix.KEPT.iterdir())) == 1
    return SimpleNamespace(
        images=images,
        seen=see(policy, images).float(),
        words=torch.randint(6, 400, (FRAMES, WORDS)),
        mask=torch.arange(WORDS) < torch.tensor([WORDS, 3, 5])[:, None],
        state=torch.randn(FRAMES, 8),
        actions=torch.randn(FRAMES, 16, 7),
        over=torch.arange(16) >= torch.tensor([16, 9, 16])[:, None],
    )


def test_the_loss_is_smolvlas(policy: TinySmolVLAPolicy, frames: SimpleNamespace) -> None:
    from expert import Memory, flow_loss
    from prefix import Prefix

    memory = Memory(Prefix(policy), frames)
    batch = {f"observation.images.{name}": frames.images[:, n] / 255 for n, name in enumerate(("image", "image2"))}
    batch |= {"observation.language.tokens": frames.words, "observation.language.attention_mask": frames.mask}
    batch |= {"observation.state": frames.state, "action": frames.actions, "action_is_pad": frames.over}
    losses = []
    for compute in (lambda: flow_loss(memory, torch.arange(FRAMES)), lambda: policy.forward(batch)[0]):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(compute().item())
    # One is computed in bfloat16.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("sees_state", [False, True])
def test_keys_and_values_are_those_of_a_prefill(
    policy: TinySmolVLAPolicy, frames: SimpleNamespace, sees_state: bool
) -> None:
    from prefix import Prefix

    prefix, model = Prefix(policy), policy.model
    with torch.no_grad():
        tokens, exist = prefix.embed(frames.seen, frames.words, frames.mask, frames.state)
        blocks = torch.zeros_like(exist)
        # The negative control: words and pictures that do see the state.
        blocks[:, -1] = not sees_state
        _, expected = model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(exist, blocks),
            position_ids=exist.cumsum(1) - 1,
            past_key_values=None,
            inputs_embeds=[tokens, None],
            use_cache=True,
        )
        far = 0.0
        for number, layer in enumerate(expected.layers):
            keys, values = prefix.keys_values(number, tokens, exist)
            for said, truth in ((keys, layer.keys), (values, layer.values)):
                there = exist[:, None, :, None]
                far = max(far, ((said - truth) * there).abs().max().item() / truth.abs().max().item())
            tokens = prefix.behind(number, tokens, exist)
    assert (far < 1e-5) is not sees_state


def test_a_trunk_that_reads_some_visual_tokens_knows_where_they_are(
    policy: TinySmolVLAPolicy, frames: SimpleNamespace
) -> None:
    import grounding
    from prefix import Prefix
    from recorded import Frames, near

    # Object and goal of each frame in each camera's image; the last ones are outside it.
    centres = torch.tensor([[0.1, 0.2], [0.9, 0.6], [0.5, 0.5], [1.9, 0.5]]).expand(FRAMES, -1, -1)
    show = near(centres.unflatten(1, (2, 2)), frames.seen.shape[2])
    around_the_middle = torch.zeros(12, 12, dtype=torch.bool)
    around_the_middle[4:8, 4:8] = True
    assert torch.equal(show[0, 1].view(12, 12), around_the_middle)
    given = {name: value for name, value in vars(frames).items() if name != "images"}
    whole = Frames(**given, positions=torch.rand(FRAMES, 6), show=show, held=torch.zeros(FRAMES, dtype=torch.bool))
    grounded = grounding.Grounding(Prefix(policy), whole)
    some, visual = grounding.thin(whole)
    assert visual.shape == (FRAMES, 2 * grounding.KEPT)
    assert (show.flatten(1).gather(1, visual).sum(1) == show.flatten(1).sum(1)).all(), "what shows them is kept"
    at = visual[..., None].expand(-1, -1, whole.seen.shape[-1])
    assert torch.equal(some.seen.flatten(1, 2), whole.seen.flatten(1, 2).gather(1, at))
    # The truth: the whole trunk, where nothing attends to what was left out.
    with torch.no_grad():
        tokens, exist = grounded.prefix.embed(whole.seen, whole.words, whole.mask, whole.state)
        count = show[0].numel()
        chosen = torch.zeros(FRAMES, count, dtype=torch.bool).scatter(1, visual, True)
        read = torch.cat([chosen, exist[:, count:]], 1)
        expected = grounded.prefix.behind(0, tokens, read, places=exist.cumsum(1) - 1)
        _, found, _ = grounded.pointed(some, visual)
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)
