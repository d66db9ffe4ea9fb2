"""Position ids as if all visual tokens were there."""

import pytest
import torch

from driving import ROUNDING, act, loss_of, run, train_offsets, wrap
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.positions import dense_positions


def spy(trunk, seen):
    """Collect the position ids that the trunk's own forward gets, after any rewriting."""
    original = type(trunk).forward

    def forward(self, *args, **kwargs):
        seen.append((kwargs["inputs_embeds"][0] is not None, kwargs["position_ids"]))
        return original(self, *args, **kwargs)

    return forward


def test_at_all_tokens_they_are_the_dense_ones(family):
    policy = family.policy(cameras=2)
    batch = family.batch(policy)
    loss, chunk, _ = run(policy, batch)
    wrapped = wrap(policy, family.tokens_per_camera, position_ids="dense")
    loss_k, chunk_k, _ = run(wrapped, batch)
    torch.testing.assert_close(loss_k, loss, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(chunk_k, chunk, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("scattering_family", ["vla_jepa", "groot"], indirect=True)
def test_what_the_trunk_adds_later_is_read_where_the_tokens_are(scattering_family):
    """The features of two layers of the tower (deepstack), sampled by torch at the tokens' coordinates."""
    policy = scattering_family.policy(cameras=2)
    batch = scattering_family.batch(policy)
    wrapped = train_offsets(wrap(policy, 4))
    trunk, inside = scattering_family.sequence[0], get_family(scattering_family.policy_type).model(policy)
    core, dense, added = inside.get_submodule(trunk.rpartition(".")[0]), [], []
    core.visual.register_forward_hook(lambda module, args, output: dense.append(output.deepstack_features))
    core.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: added.append(kwargs["deepstack_visual_embeds"]), with_kwargs=True
    )
    act(wrapped, batch)
    assert len(dense) == len(added) == 1
    assert len(dense[0]) == len(added[0]) == 2
    grid = wrapped.reducer.token_grid
    for features, given in zip(dense[0], added[0], strict=True):
        # Sample by sample, camera by camera.
        maps = features.float().unflatten(0, (-1, 2, *grid)).permute(1, 0, 4, 2, 3)
        read = [
            torch.nn.functional.grid_sample(
                camera, 2 * coordinates[:, None] - 1, align_corners=False, padding_mode="border"
            )
            for camera, coordinates in zip(maps, wrapped.seam.coordinates, strict=True)
        ]
        expected = torch.cat(read, dim=-1)[:, :, 0].transpose(1, 2).flatten(0, 1)
        # LeRobot runs one of the towers in bfloat16, and places are rounded to 256ths of a cell.
        torch.testing.assert_close(given.float(), expected, atol=0.03 * float(expected.std()), rtol=0)


@pytest.mark.parametrize("cameras", [1, 2])
def test_what_follows_the_images_stays_where_it_was(concatenating_family, cameras, monkeypatch):
    policy = concatenating_family.policy(cameras)
    batch = concatenating_family.batch(policy)
    trunk, seen = concatenating_family.trunk_of(policy), []
    monkeypatch.setattr(type(trunk), "forward", spy(trunk, seen))
    policy.forward(dict(batch))
    act(policy, batch)
    dense = list(seen)
    seen.clear()
    wrapped = wrap(policy, 4, position_ids="dense")
    wrapped.forward(dict(batch))
    act(wrapped, batch)
    assert len(seen) == len(dense) > 1
    visual, all_visual = 4 * cameras, concatenating_family.tokens_per_camera * cameras
    height, width = wrapped.reducer.token_grid
    column, row = (wrapped.reducer.anchors(4) * torch.tensor([width, height]) - 0.5).round().long().T
    cells = row * width + column
    for (prefix, ours), (_, theirs) in zip(seen, dense, strict=True):
        if prefix and ours.shape[1] > 1:
            kept = torch.cat([cells + camera * concatenating_family.tokens_per_camera for camera in range(cameras)])
            assert torch.equal(ours[:, :visual], theirs[:, :all_visual][:, kept].float())
            assert torch.equal(ours[:, visual:], theirs[:, all_visual:].float())
        else:
            assert torch.equal(ours, theirs)


def test_it_matters_and_is_undone(family):
    policy = family.policy()
    batch = family.batch(policy)
    before = act(policy, batch)
    # The loss, because decoded actions may be the same.
    here = loss_of(train_offsets(wrap(policy, 4, position_ids="consecutive")), batch)
    policy.config.device = "cpu"
    wrapped = wrap(family.policy(), 4, position_ids="dense")
    there = loss_of(train_offsets(wrapped), batch)
    assert not torch.equal(here, there)
    restored = wrapped.detach()
    torch.testing.assert_close(act(restored, batch), before, atol=ROUNDING, rtol=0)


def test_without_visual_tokens_what_follows_stays_too(concatenating_family, monkeypatch):
    policy = concatenating_family.policy()
    batch = concatenating_family.batch(policy)
    trunk, seen = concatenating_family.trunk_of(policy), []
    monkeypatch.setattr(type(trunk), "forward", spy(trunk, seen))
    act(policy, batch)
    _, dense = seen[0]
    seen.clear()
    act(wrap(policy, 4, reducer="blind", position_ids="dense"), batch)
    _, ours = seen[0]
    assert torch.equal(ours, dense[:, concatenating_family.tokens_per_camera :].float())


def test_between_two_cells_is_between_their_ids():
    coordinates = torch.tensor([[[0.5 / 12, 0.5 / 12], [1.0 / 12, 0.5 / 12], [1.0, 1.0]]])
    ids, moved = dense_positions(torch.arange(9)[None], [coordinates], (12, 12), before=2, after=1)
    assert ids.tolist() == [[0, 1, 2, 2.5, 145, 146, 147, 148, 149]]
    assert moved.tolist() == [[141]]


def test_a_masked_camera_moves_nothing():
    """Two cameras of two tokens each, of a 2 x 2 grid; each sample lacks another one of them, then comes one word."""
    coordinates = torch.tensor([[[0.25, 0.25], [0.75, 0.75]]]).expand(2, -1, -1)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 1, 1, 1]])
    ids, moved = dense_positions(mask.cumsum(1) - 1, [coordinates, coordinates], (2, 2), before=0, after=0)
    assert ids[0, :2].tolist() == [0, 3]
    assert ids[1, 2:4].tolist() == [0, 3]
    assert ids[:, 4].tolist() == [4, 4]
    assert moved.tolist() == [[2], [2]]
