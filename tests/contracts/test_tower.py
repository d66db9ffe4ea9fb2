"""Sampling inside the vision tower: with every token the dense policy, with fewer the later layers see fewer."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional

from driving import ROUNDING, act, loss_of, run, train_offsets, wrap
from lerobot_grids.training.distillation import Distillation, SelfTeacher
from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.reducers import reducer_config

K = 9


def tower_of(policy):
    """(the tower's layers, its last norm, how many patches a token has along a side)."""
    family = get_family(policy.config.type)
    tower = family.tower(policy)
    (norm,) = (
        module for name, module in family.stages(policy).vision.named_modules() if name.endswith("post_layernorm")
    )
    return tower.encoder, norm, tower.block


def kept(module):
    """Collects the outputs of a module."""
    seen = []
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


@pytest.mark.parametrize("after", [0, 1, None], ids=["first", "second", "last"])
def test_at_all_tokens_it_is_the_dense_policy(tower_family, after):
    after = tower_family.layers if after is None else after
    policy = tower_family.policy()
    batch = tower_family.batch(policy)
    loss, chunk, gradients = run(policy, batch)
    wrapped = wrap(policy, tower_family.tokens_per_camera, sample_after_layer=after)
    loss_k, chunk_k, gradients_k = run(wrapped, batch)
    # Blocks of patches come in another order than rows of patches, and sums of another order round differently.
    tolerance = ROUNDING if tower_of(policy)[2] > 1 else 0.0
    torch.testing.assert_close(loss_k, loss, atol=tolerance, rtol=0)
    torch.testing.assert_close(chunk_k, chunk, atol=tolerance, rtol=0)
    assert gradients.keys() == gradients_k.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_k[name], gradient, atol=tolerance, rtol=0, msg=name)


def test_the_mean_sampler_can_too(tower_family):
    policy = tower_family.policy(cameras=2)
    batch = tower_family.batch(policy)
    loss = loss_of(policy, batch)
    wrapped = wrap(policy, tower_family.tokens_per_camera, reducer="mean", sample_after_layer=1)
    torch.testing.assert_close(loss_of(wrapped, batch), loss, atol=ROUNDING, rtol=0)


def test_after_the_last_layer_is_reading_in_front_of_the_last_norm(tower_family):
    """What the trunk gets, by torch's own sampling of the dense policy's states."""
    policy = tower_family.policy()
    batch = tower_family.batch(policy)
    encoder, norm, block = tower_of(policy)
    states = kept(encoder)
    loss_of(policy, batch)
    maps = states[0].last_hidden_state
    options = {"interpolation": "bilinear", "geometry_width": 0, "sample_after_layer": tower_family.layers}
    wrapped = train_offsets(wrap(policy, 4, reducer="mean", **options))
    samples, tokens = kept(wrapped.reducer), kept(wrapped.family.feature_source(policy))
    loss_of(wrapped, batch)
    height, width = wrapped.reducer.token_grid
    cells = samples[0].coordinates * torch.tensor([width, height]) - 0.5
    assert (cells - cells.round()).abs().max() > 0.1
    # Patch by patch, in a token's row order: the centre of patch (i, j) of a block whose first patch is at `cells`.
    places = [cells * block + torch.tensor([float(j), float(i)]) for i in range(block) for j in range(block)]
    points = (torch.stack(places, dim=2).flatten(1, 2) + 0.5) / torch.tensor([width * block, height * block])
    image = maps.unflatten(1, (height * block, width * block)).permute(0, 3, 1, 2)
    read = functional.grid_sample(image, 2 * points[:, None] - 1, align_corners=False, padding_mode="border")
    expected = norm(read[:, :, 0].transpose(1, 2))
    source = wrapped.family.feature_source(policy)
    if hasattr(source, "modality_projection"):
        expected = source.modality_projection(expected.unflatten(1, (4, block * block)).flatten(2))
    assert tokens[0].shape[1] == 4
    torch.testing.assert_close(tokens[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("limits", [{}, {"observation.images.1": 2}], ids=["alike", "unlike"])
def test_later_layers_see_the_tokens_alone(tower_family, after, limits):
    policy = tower_family.policy(cameras=2)
    batch = tower_family.batch(policy)
    encoder, _, block = tower_of(policy)
    lengths = tower_family.lengths(policy)
    loss_of(policy, batch)
    dense_length = lengths[0]
    lengths.clear()
    wrapped = train_offsets(wrap(policy, K, sample_after_layer=after, camera_tokens=limits))
    seen = []
    for number, layer in enumerate(encoder.layers):
        layer.register_forward_pre_hook(lambda layer, inputs, number=number: seen.append((number, inputs[0].shape)))
    loss_of(wrapped, batch)
    size, dense = len(batch["action"]), tower_family.tokens_per_camera
    calls = [(2 * size, K)] if not limits else [(size, K), (size, 2)]
    expected = [
        (number, images, (dense if number < after else count) * block**2)
        for images, count in calls
        for number in range(tower_family.layers)
    ]
    assert [(number, *shape[:2]) for number, shape in seen] == expected
    assert dense_length - lengths[0] == 2 * dense - sum(images // size * count for images, count in calls)


def test_gradients_reach_an_untrained_sampler(tower_family):
    wrapped = wrap(tower_family.policy(), K, sample_after_layer=0)
    wrapped.base.requires_grad_(False)
    loss_of(wrapped, tower_family.batch(wrapped.base)).backward()
    for name in ("query.weight", "value.up.weight", "geometry.out.weight"):
        assert wrapped.reducer.get_parameter(name).grad.abs().sum() > 0, name


def test_gradient_checkpointing_changes_no_gradient(tower_family):
    """LeRobot's own, where it has one, and transformers' in each layer of the tower."""
    policy = tower_family.policy(cameras=2)
    wrapped = train_offsets(wrap(policy, K, sample_after_layer=1)).train()
    vision = wrapped.family.stages(policy).vision
    batch = tower_family.batch(policy)
    switches = [lambda: None, vision.gradient_checkpointing_enable]
    if hasattr(policy.model, "gradient_checkpointing_enable"):
        switches += [vision.gradient_checkpointing_disable, policy.model.gradient_checkpointing_enable]
    results = []
    for switch in switches:
        switch()
        wrapped.zero_grad()
        loss_of(wrapped, batch).backward()
        results.append({name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None})
    plain, *others = results
    assert "reducer.query.weight" in plain
    for other in others:
        assert plain.keys() == other.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(other[name], gradient, atol=ROUNDING, rtol=1e-4, msg=name)


def test_half_precision_keeps_float32_coordinates(tower_family):
    policy = tower_family.policy(**tower_family.bfloat16)
    wrapped = train_offsets(wrap(policy, K, sample_after_layer=1))
    samples = kept(wrapped.reducer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(wrapped, tower_family.batch(policy)).backward()
    assert samples[0].coordinates.dtype == torch.float32
    assert samples[0].coordinates.isfinite().all()
    assert wrapped.reducer.query.weight.grad.abs().sum() > 0


def test_detach_restores_the_dense_policy_bit_for_bit(tower_family):
    policy = tower_family.policy()
    batch = tower_family.batch(policy)
    loss, chunk = loss_of(policy, batch).detach(), act(policy, batch)
    own = {name: set(vars(module)) for name, module in policy.named_modules()}
    wrapped = train_offsets(wrap(policy, K, sample_after_layer=1))
    assert not torch.equal(loss_of(wrapped, batch), loss)
    with wrapped.looking_everywhere():
        torch.testing.assert_close(loss_of(wrapped, batch), loss, atol=0, rtol=0)
    restored = wrapped.detach()
    assert torch.equal(loss_of(restored, batch), loss)
    assert torch.equal(act(restored, batch), chunk)
    assert {name: set(vars(module)) for name, module in policy.named_modules()} == own


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_copy_is_whole_and_its_own(tower_family, duplicate):
    wrapped = train_offsets(wrap(tower_family.policy(), K, sample_after_layer=1))
    batch = tower_family.batch(wrapped.base)
    before = loss_of(wrapped, batch)
    try:
        twin = duplicate(wrapped)
    except AttributeError as error:
        # LeRobot's π classes hold classes defined in functions: what cannot be pickled dense cannot be wrapped.
        assert "local object" in str(error)  # noqa: PT017
        return
    assert torch.equal(loss_of(twin, batch), before)
    torch.nn.init.zeros_(twin.reducer.query.weight)
    torch.nn.init.zeros_(tower_of(twin.base)[0].layers[-1].mlp.fc2.weight)
    assert not torch.equal(loss_of(twin, batch), before)
    assert torch.equal(loss_of(wrapped, batch), before)


# One is enough: the seam is the same for all, and tracing takes seconds.
@pytest.mark.parametrize("tower_family", ["pi0"], indirect=True)
def test_the_tower_breaks_no_graph(tower_family):
    wrapped = train_offsets(wrap(tower_family.policy(cameras=2), K, sample_after_layer=1))
    torch._dynamo.reset()
    report = torch._dynamo.explain(getattr(wrapped.base, tower_family.seam))(dict(tower_family.batch(wrapped.base)))
    assert report.break_reasons == []


def test_the_self_teacher_is_the_dense_policy_and_its_map_the_goal(tower_family):
    policy = tower_family.policy(cameras=2)
    batch = tower_family.batch(policy)
    wrapped = wrap(policy, tower_family.tokens_per_camera, sample_after_layer=0)
    policy.requires_grad_(False)
    # With every token the student's map is the teacher's.
    _, distance = Distillation(wrapped.train(), SelfTeacher(wrapped), map_weight=1.0).losses(batch)
    assert distance.item() == pytest.approx(0, abs=ROUNDING)
    wrapped = train_offsets(wrap(wrapped.detach(), 4, sample_after_layer=1)).train()
    distillation = Distillation(wrapped, SelfTeacher(wrapped), map_weight=1.0)
    looks = kept(wrapped.reducer)
    torch.manual_seed(0)
    _, with_map = distillation.losses(batch)
    distillation.map_weight = 0.0
    torch.manual_seed(0)
    _, without = distillation.losses(batch)
    # The goal, by torch's own sampling of the map of the policy that was never wrapped.
    looked, maps = looks[0].coordinates.chunk(2), kept(wrapped.family.feature_source(policy))
    height, width = wrapped.reducer.token_grid
    loss_of(wrapped, batch)
    ours = maps.pop().chunk(2)
    wrapped.detach()
    loss_of(policy, batch)
    goals = [
        functional.grid_sample(
            dense.unflatten(1, (height, width)).permute(0, 3, 1, 2),
            2 * places[:, None] - 1,
            align_corners=False,
            padding_mode="border",
        )[:, :, 0].transpose(1, 2)
        for dense, places in zip(maps, looked, strict=True)
    ]
    expected = (torch.cat(ours) - torch.cat(goals)).square().mean() / torch.cat(goals).var()
    torch.testing.assert_close(with_map - without, expected, atol=1e-4, rtol=1e-3)
    with_map.backward()
    assert wrapped.reducer.query.weight.grad.abs().sum() > 0


def test_a_map_after_the_tower_teaches_nothing(tower_family):
    wrapped = wrap(tower_family.policy(), K)
    with pytest.raises(GridsError, match=r"after the vision tower.*give --reducer\.sample_after_layer, or drop it"):
        Distillation(wrapped, SelfTeacher(wrapped), map_weight=0.5)


def test_layers_that_the_tower_does_not_have_are_refused(tower_family):
    count = tower_family.layers
    with pytest.raises(UnsupportedPolicyError, match=rf"tower has {count} layers; choose 0 \.\. {count}, or drop it"):
        wrap(tower_family.policy(), K, sample_after_layer=count + 1)


def test_a_tower_that_cannot_be_reached_is_refused(towerless_family):
    policy = towerless_family.policy()
    with pytest.raises(UnsupportedPolicyError, match=r"inside the vision tower of the .*; drop sample_after_layer"):
        wrap(policy, K, sample_after_layer=0)
    # Nothing was changed.
    assert wrap(policy, K).num_tokens == K


@pytest.mark.parametrize("reducer", ["pool", "uniform", "tome", "fastv", "blind"])
def test_a_reducer_that_cannot_is_refused(reducer):
    with pytest.raises(GridsError, match=f"reducer '{reducer}' has no option sample_after_layer; its options are"):
        reducer_config(reducer, sample_after_layer=0)


@pytest.mark.parametrize("layer", [-1, 1.5, "last", True])
def test_what_is_no_number_of_layers(layer):
    with pytest.raises(GridsError, match=r"sample_after_layer=.*; give a number of layers, 0 or more, or drop it"):
        reducer_config("grids", sample_after_layer=layer)
