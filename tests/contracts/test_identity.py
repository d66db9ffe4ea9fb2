"""With every token the wrapped policy is the dense policy; with fewer, only their number differs."""

import copy
import pickle
import re

import pytest
import torch

from driving import ROUNDING, act, require_optional_cameras, run, train_offsets, wrap
from lerobot_policy_grids.errors import GridsError, TokenGridError, UnsupportedPolicyError
from lerobot_policy_grids.families import get_family


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_at_all_tokens_is_exact_for_one_camera(family, dtype):
    policy = family.policy()
    batch = family.batch(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, chunk, gradients = run(policy, batch)
        wrapped = wrap(policy, family.tokens_per_camera)
        loss_k, chunk_k, gradients_k = run(wrapped, batch)
    assert torch.equal(loss, loss_k)
    assert torch.equal(chunk, chunk_k)
    assert gradients.keys() == gradients_k.keys()
    for name, gradient in gradients.items():
        if name.endswith(family.rounded):
            torch.testing.assert_close(gradients_k[name], gradient, atol=ROUNDING, rtol=0, msg=name)
        else:
            assert torch.equal(gradient, gradients_k[name]), name


@pytest.mark.parametrize("cameras", [2, 3])
def test_identity_at_all_tokens_up_to_rounding_for_several_cameras(family, cameras):
    policy = family.policy(cameras)
    batch = family.batch(policy)
    loss, chunk, gradients = run(policy, batch)
    loss_k, chunk_k, gradients_k = run(wrap(policy, family.tokens_per_camera), batch)
    torch.testing.assert_close(loss_k, loss, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(chunk_k, chunk, atol=ROUNDING, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_k[name], gradient, atol=ROUNDING, rtol=0, msg=name)


def test_detach_restores_the_dense_policy_bit_for_bit(family):
    policy = family.policy()
    batch = family.batch(policy)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    loss, chunk, _ = run(policy, batch)
    wrapped = train_offsets(wrap(policy, 9))
    reduced, _, _ = run(wrapped, batch)
    assert not torch.equal(loss, reduced)
    restored = wrapped.detach()
    assert restored is policy
    loss_after, chunk_after, _ = run(policy, batch)
    assert torch.equal(loss, loss_after)
    assert torch.equal(chunk, chunk_after)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize(("cameras", "k"), [(1, 16), (2, 4), (3, 1)])
def test_prefix_is_shorter_and_masks_and_positions_follow(concatenating_family, cameras, k):
    family = concatenating_family
    policy = family.policy(cameras)
    batch = family.batch(policy)
    seen = family.spy(policy)
    policy.forward(dict(batch))
    act(policy, batch)
    dense = list(seen)
    seen.clear()
    wrapped = wrap(policy, k, position_ids="consecutive")
    wrapped.forward(dict(batch))
    act(wrapped, batch)
    removed = cameras * (family.tokens_per_camera - k)
    assert len(seen) == len(dense)
    for (length, mask, positions), (dense_length, dense_mask, dense_positions) in zip(seen, dense, strict=True):
        assert length == dense_length - removed
        assert mask.shape[-1] == dense_mask.shape[-1] - removed
        # Visual tokens come first and all are real: what is left of mask and positions is the dense tail.
        visual, dense_visual = cameras * k, cameras * family.tokens_per_camera
        assert torch.equal(mask[:, visual:, visual:], dense_mask[:, dense_visual:, dense_visual:])
        assert mask[:, :visual, :visual].all()
        assert torch.equal(positions[:, visual:], dense_positions[:, dense_visual:] - removed)
        assert torch.equal(positions[0, :visual], torch.arange(visual))


def test_a_camera_may_get_fewer_tokens_than_the_others(family):
    policy = family.policy(2)
    batch = family.batch(policy)
    lengths, chunks = [], []
    names = list(policy.config.image_features)
    for limits in ({}, {names[1]: 2}, {names[1]: 9}):
        policy = family.policy(2)
        seen = family.lengths(policy)
        wrapped = train_offsets(wrap(policy, 5, camera_tokens=limits))
        chunks.append(act(wrapped, batch))
        lengths.append(seen[0])
    assert lengths[0] - lengths[1] == 3
    assert lengths[2] == lengths[0]
    assert torch.equal(chunks[2], chunks[0])
    assert not torch.equal(chunks[1], chunks[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_copy_is_whole_and_its_own(family, duplicate):
    dense = family.policy()
    try:
        duplicate(dense)
    except (AttributeError, pickle.PicklingError) as error:
        # LeRobot's π classes hold classes defined in functions, its MolmoAct2 holds names of kernels: what cannot be
        # pickled dense cannot be wrapped.
        assert re.search("local object|_SDPBackend", str(error))  # noqa: PT017
        return
    wrapped = train_offsets(wrap(dense, 9))
    batch = family.batch(wrapped.base)
    twin = duplicate(wrapped)
    before, *_ = run(wrapped, batch)
    assert torch.equal(run(twin, batch)[0], before)
    torch.nn.init.zeros_(twin.reducer.geometry.out.weight)
    torch.nn.init.normal_(twin.reducer.query.weight)
    assert not torch.equal(run(twin, batch)[0], before)
    assert torch.equal(run(wrapped, batch)[0], before)
    try:
        again = duplicate(wrapped)
    except AttributeError:
        # Some of transformers' models hold functions defined in functions once they have run.
        dense = wrapped.detach()
        with pytest.raises(AttributeError, match="local object"):
            duplicate(dense)
    else:
        assert torch.equal(run(again, batch)[0], before)


def test_identity_with_a_camera_missing(resizing_family):
    """Left out where LeRobot sends a blank image and masks it, for the same result."""
    family = resizing_family
    require_optional_cameras(family)
    policy = family.policy(cameras=3)
    batch = family.batch(policy)
    del batch[list(policy.config.image_features)[1]]
    loss, chunk, _ = run(policy, batch)
    loss_k, chunk_k, _ = run(wrap(policy, family.tokens_per_camera), batch)
    torch.testing.assert_close(loss_k, loss, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(chunk_k, chunk, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(48, 96), (90, 60), (64, 64)])
def test_image_region_is_where_the_policy_puts_the_image(resizing_family, height, width):
    family = resizing_family
    if family.makes_patches:
        pytest.skip("images of this family become patches in its pre-processor")
    policy = family.policy()
    wrapped = wrap(policy, 9)
    batch = family.batch(policy)
    key = next(iter(policy.config.image_features))
    batch[key] = torch.ones(len(batch[key]), 3, height, width)
    pixels = []

    def keep(module, args, kwargs):
        pixels.append((args[0] if args else kwargs["pixel_values"])[0, 0])

    wrapped.family.stages(policy).vision.register_forward_pre_hook(keep, with_kwargs=True)
    act(wrapped, batch)
    # White is 1 after normalisation; padding is not.
    white = (pixels[0] > 0.99).nonzero()
    (top, left), (bottom, right) = white.amin(0).tolist(), (white.amax(0) + 1).tolist()
    size = pixels[0].shape[0]
    expected = (left / size, top / size, right / size, bottom / size)
    assert wrapped.family.image_region(policy, height, width) == pytest.approx(expected)


def test_a_family_that_resizes_nothing_says_what_it_needs(unsizing_family):
    family = unsizing_family
    policy = family.policy()
    assert get_family(family.policy_type).image_region(policy, 48, 96) == (0, 0, 1, 1)
    batch = family.batch(policy)
    key = next(iter(policy.config.image_features))
    wrapped = wrap(policy, 9)
    with pytest.raises(TokenGridError, match=r"images of 48 x 96 pixels give 6 x 12 tokens, .* has 8 x 8; set"):
        act(wrapped, batch | {key: torch.ones(len(batch[key]), 3, 48, 96)})
    with pytest.raises(UnsupportedPolicyError, match=r"cameras of different sizes \(48 x 96, 64 x 64 pixels\)"):
        wrap(family.policy(shapes=[(64, 64), (48, 96)]), 9)
    # LeRobot's own class does not act without a camera either.
    for each in (wrapped.detach(), wrapped):
        with pytest.raises((KeyError, GridsError)):
            act(each, {name: value for name, value in batch.items() if name != key})


def test_feature_map_is_row_major(family):
    """A bright patch excites the token at its place most, up to a neighbour, in the grid the adapter declares."""
    policy = family.policy()
    wrapped = wrap(policy, family.tokens_per_camera)
    batch = family.batch(policy)
    key = next(iter(policy.config.image_features))
    maps = []
    wrapped.reducer.register_forward_hook(lambda m, inputs, o: maps.append(inputs[0].detach()))
    height, width = wrapped.reducer.token_grid
    for row, column in ((1, width - 2), (height - 2, 1), (2, 7)):
        maps.clear()
        # Not flat: a normalised flat area amplifies anything.
        images = torch.randn_like(batch[key])
        for bright in (0.0, 1.0):
            cell_height, cell_width = images.shape[-2] // height, images.shape[-1] // width
            rows = slice(row * cell_height, (row + 1) * cell_height)
            columns = slice(column * cell_width, (column + 1) * cell_width)
            images[..., rows, columns] = 4 * bright
            wrapped.predict_action_chunk(family.changed(policy, batch, **{key: images.clone()}))
        change = (maps[1] - maps[0]).norm(dim=-1)[0]
        seen_row, seen_column = divmod(int(change.argmax()), width)
        assert max(abs(seen_row - row), abs(seen_column - column)) <= 1
