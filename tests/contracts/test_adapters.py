"""What every adapter promises, checked against the dense policy."""

import copy
import itertools
import pickle

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from safetensors.torch import load_file, save_file

from lerobot_grids.lora import add_lora, merged_state_dict
from lerobot_policy_grids import GridsConfig, GridsPolicy
from lerobot_policy_grids.checkpoint import load_weights
from lerobot_policy_grids.errors import BudgetError, CheckpointError, GridsError, UnsupportedPolicyError
from lerobot_policy_grids.modeling_grids import load_checkpoint

# One vision call for all cameras instead of one each: other batch sizes round differently in float32.
ROUNDING = 1e-5


def wrap(policy, k, **options):
    config = GridsConfig(base=policy.config, num_tokens=k, **options)
    wrapped = GridsPolicy(config, base=policy)
    return wrapped.eval()


def train_offsets(wrapped):
    """As after training: offsets and geometry are not zero."""
    torch.manual_seed(3)
    for parameter in wrapped.reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return wrapped


def base_of(policy):
    return policy.base if isinstance(policy, GridsPolicy) else policy


def act(policy, family, batch):
    """The action chunk, with every random draw fixed."""
    torch.manual_seed(4)
    _, options = family.fix_noise(base_of(policy))
    return policy.predict_action_chunk(dict(batch), **options)


def run(policy, family, batch):
    """(loss, action chunk, gradients of the base) with every random draw fixed."""
    torch.manual_seed(4)
    options, _ = family.fix_noise(base_of(policy))
    policy.zero_grad()
    loss, _ = policy.forward(dict(batch), **options)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in base_of(policy).named_parameters() if p.grad is not None}
    policy.zero_grad()
    return loss.detach(), act(policy, family, batch), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_at_all_tokens_is_exact_for_one_camera(family, dtype):
    policy = family.policy()
    batch = family.batch(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, chunk, gradients = run(policy, family, batch)
        wrapped = wrap(policy, family.tokens_per_camera)
        loss_k, chunk_k, gradients_k = run(wrapped, family, batch)
    assert torch.equal(loss, loss_k)
    assert torch.equal(chunk, chunk_k)
    assert gradients.keys() == gradients_k.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_k[name]), name


@pytest.mark.parametrize("cameras", [2, 3])
def test_identity_at_all_tokens_up_to_rounding_for_several_cameras(family, cameras):
    policy = family.policy(cameras)
    batch = family.batch(policy)
    loss, chunk, gradients = run(policy, family, batch)
    loss_k, chunk_k, gradients_k = run(wrap(policy, family.tokens_per_camera), family, batch)
    torch.testing.assert_close(loss_k, loss, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(chunk_k, chunk, atol=ROUNDING, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_k[name], gradient, atol=ROUNDING, rtol=0, msg=name)


def test_detach_restores_the_dense_policy_bit_for_bit(family):
    policy = family.policy()
    batch = family.batch(policy)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    loss, chunk, _ = run(policy, family, batch)
    wrapped = train_offsets(wrap(policy, 9))
    reduced, _, _ = run(wrapped, family, batch)
    assert not torch.equal(loss, reduced)
    restored = wrapped.detach()
    assert restored is policy
    loss_after, chunk_after, _ = run(policy, family, batch)
    assert torch.equal(loss, loss_after)
    assert torch.equal(chunk, chunk_after)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize(("cameras", "k"), [(1, 16), (2, 4), (3, 1)])
def test_prefix_is_shorter_and_masks_and_positions_follow(family, cameras, k):
    policy = family.policy(cameras)
    batch = family.batch(policy)
    seen = family.spy(policy)
    policy.forward(dict(batch))
    act(policy, family, batch)
    dense = list(seen)
    seen.clear()
    wrapped = wrap(policy, k)
    wrapped.forward(dict(batch))
    act(wrapped, family, batch)
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
        seen = family.spy(policy)
        wrapped = train_offsets(wrap(policy, 5, camera_tokens=limits))
        chunks.append(act(wrapped, family, batch))
        lengths.append(seen[0][0])
    assert lengths[0] - lengths[1] == 3
    assert lengths[2] == lengths[0]
    assert torch.equal(chunks[2], chunks[0])
    assert not torch.equal(chunks[1], chunks[0])


def test_gradients_reach_the_sampler_and_not_a_frozen_base(family):
    wrapped = train_offsets(wrap(family.policy(), 9))
    wrapped.base.requires_grad_(False)
    loss, _ = wrapped.forward(family.batch(wrapped.base))
    loss.backward()
    for name, parameter in wrapped.reducer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in wrapped.base.parameters())


def test_an_untrained_sampler_gets_a_gradient_through_its_coordinates(family):
    wrapped = wrap(family.policy(), 9)
    loss, _ = wrapped.forward(family.batch(wrapped.base))
    loss.backward()
    assert wrapped.reducer.coordinate_head.out.weight.grad.abs().sum() > 0


def test_coordinates_depend_on_instruction_state_and_image(family):
    wrapped = train_offsets(wrap(family.policy(), 9))
    batch = family.batch(wrapped.base)

    def coordinates(changed):
        seen = []
        handle = wrapped.reducer.register_forward_hook(lambda m, i, output: seen.append(output.coordinates))
        wrapped.predict_action_chunk(dict(batch | changed))
        handle.remove()
        return seen[0]

    reference = coordinates({})
    language = "observation.language.tokens"
    image = next(iter(wrapped.base.config.image_features))
    for key in (language, "observation.state", image):
        flipped = batch[key].flip(0)
        assert not torch.equal(coordinates({key: flipped}), reference), key


def test_masked_language_tokens_do_not_move_the_coordinates(family):
    wrapped = train_offsets(wrap(family.policy(), 9))
    batch = family.batch(wrapped.base)
    mask = batch["observation.language.attention_mask"].bool()
    assert not mask.all()
    changed = torch.where(mask, batch["observation.language.tokens"], 7)
    seen = []
    wrapped.reducer.register_forward_hook(lambda m, i, output: seen.append(output.coordinates))
    for tokens in (batch["observation.language.tokens"], changed):
        wrapped.predict_action_chunk(dict(batch) | {"observation.language.tokens": tokens})
    assert torch.equal(seen[0], seen[1])


def test_a_missing_camera_is_told_apart_from_the_present_ones(family):
    wrapped = train_offsets(wrap(family.policy(cameras=3), 9))
    batch = family.batch(wrapped.base)
    cameras = list(wrapped.base.config.image_features)
    ids = []
    wrapped.reducer.register_forward_hook(lambda m, inputs, o: ids.append(inputs[1]["camera"].unique().tolist()))
    del batch[cameras[1]]
    chunk = wrapped.predict_action_chunk(batch)
    assert torch.isfinite(chunk).all()
    assert ids == [[0, 2]]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_copy_is_whole_and_its_own(family, duplicate):
    dense = family.policy()
    try:
        duplicate(dense)
    except AttributeError as error:
        # LeRobot's π classes hold classes defined in functions: what cannot be pickled dense cannot be wrapped.
        assert "local object" in str(error)  # noqa: PT017
        return
    wrapped = train_offsets(wrap(dense, 9))
    batch = family.batch(wrapped.base)
    before, *_ = run(wrapped, family, batch)
    twin = duplicate(wrapped)
    assert torch.equal(run(twin, family, batch)[0], before)
    torch.nn.init.zeros_(twin.reducer.geometry.out.weight)
    torch.nn.init.normal_(twin.reducer.coordinate_head.out.bias)
    assert not torch.equal(run(twin, family, batch)[0], before)
    assert torch.equal(run(wrapped, family, batch)[0], before)


def test_identity_with_a_camera_missing(family):
    """Left out where LeRobot sends a blank image and masks it, for the same result."""
    policy = family.policy(cameras=3)
    batch = family.batch(policy)
    del batch[list(policy.config.image_features)[1]]
    loss, chunk, _ = run(policy, family, batch)
    loss_k, chunk_k, _ = run(wrap(policy, family.tokens_per_camera), family, batch)
    torch.testing.assert_close(loss_k, loss, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(chunk_k, chunk, atol=ROUNDING, rtol=0)


def test_gradient_checkpointing_changes_no_gradient(family):
    policy = family.policy(cameras=2)
    if not hasattr(policy.model, "gradient_checkpointing_enable"):
        return  # SmolVLA has none
    wrapped = train_offsets(wrap(policy, 9)).train()
    batch = family.batch(policy)
    results = []
    for switch in (policy.model.gradient_checkpointing_disable, policy.model.gradient_checkpointing_enable):
        switch()
        looks = []
        handle = wrapped.reducer.register_forward_hook(lambda *args, looks=looks: looks.append(1))
        torch.manual_seed(4)
        options, _ = family.fix_noise(policy)
        wrapped.zero_grad()
        wrapped.forward(dict(batch), **options)[0].backward()
        handle.remove()
        assert len(looks) == 1  # recomputation must not sample again
        results.append({name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None})
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    assert "reducer.coordinate_head.out.weight" in plain
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=ROUNDING, rtol=1e-4, msg=name)


def test_a_bfloat16_policy_keeps_float32_coordinates(family):
    policy = family.policy(**family.bfloat16)
    wrapped = train_offsets(wrap(policy, 9))
    seen = []
    wrapped.reducer.register_forward_hook(lambda m, i, output: seen.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = wrapped.forward(family.batch(policy))
        loss.backward()
        chunk = wrapped.predict_action_chunk(family.batch(policy))
    assert torch.isfinite(chunk).all()
    assert all(sampled.coordinates.dtype == torch.float32 for sampled in seen)
    assert wrapped.reducer.coordinate_head.out.weight.grad.abs().sum() > 0


def test_low_rank_adapters_train_beside_the_reducer(family):
    """The recipe for small GPUs: a frozen base, in bfloat16 where the family has that, under autocast."""
    policy = family.policy()
    wrapped = train_offsets(wrap(policy, 9))
    names = list(policy.state_dict())
    halved = wrapped.adapter.to_bfloat16(policy)
    assert halved == (policy.config.type != "tiny_smolvla")
    if policy._get_default_peft_targets() is None:
        with pytest.raises(GridsError, match="no LoRA targets"):
            add_lora(policy, rank=2)
        return
    add_lora(policy, rank=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = wrapped.forward(family.batch(policy))
    loss.backward()
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert any(".lora_B." in name for name in trained)
    assert "reducer.coordinate_head.out.weight" in trained
    assert all(".lora_" in name or name.startswith("reducer.") for name in trained)
    merged = merged_state_dict(policy)
    assert list(merged) == names


def test_looking_compiles_without_a_graph_break(family):
    wrapped = train_offsets(wrap(family.policy(cameras=2), 9))
    batch = family.batch(wrapped.base)
    feature_map = torch.randn(2 * len(batch["action"]), *wrapped.reducer.token_grid, wrapped.reducer.width)
    context = {
        "language": torch.randn(len(feature_map), wrapped.reducer.norms["language"].normalized_shape[0]),
        "state": torch.randn(len(feature_map), wrapped.adapter.layout(wrapped.base).state_width),
        "camera": torch.zeros(len(feature_map), dtype=torch.int64),
    }
    torch._dynamo.reset()
    compiled = torch.compile(wrapped.reducer, backend="eager", fullgraph=True)
    expected, got = wrapped.reducer(feature_map, context), compiled(feature_map, context)
    torch.testing.assert_close(got.tokens, expected.tokens)
    torch.testing.assert_close(got.coordinates, expected.coordinates)


def test_the_seam_breaks_no_graph(family):
    """Where torch.compile gives up, it is in LeRobot's or transformers' code, as in the dense policy."""
    wrapped = train_offsets(wrap(family.policy(cameras=2), 9))
    seam = "prepare_images" if hasattr(wrapped.base, "prepare_images") else "_preprocess_images"
    torch._dynamo.reset()
    report = torch._dynamo.explain(getattr(wrapped.base, seam))(dict(family.batch(wrapped.base)))
    places = [reason.user_stack[-1].filename for reason in report.break_reasons]
    assert not [place for place in places if "lerobot_policy_grids" in place]
    if wrapped.base.config.type.startswith("pi0"):
        assert places == []


def test_a_dense_checkpoint_is_loaded_exactly_or_refused(family, tmp_path):
    policy, other = family.policy(), family.policy()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    policy.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    load_checkpoint(other, tmp_path)
    assert all(torch.equal(value, policy.state_dict()[name]) for name, value in other.state_dict().items())
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if "action_out_proj" in name or "lm_head" in name)
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != name}, "missing"),
        (tensors | {"stranger": torch.zeros(1)}, "unexpected"),
        (tensors | {name: torch.zeros(1)}, "has shape"),
        (tensors | {name: torch.full_like(tensors[name], torch.nan)}, "NaN"),
    ):
        save_file(broken, weights)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(other, tmp_path)
    weights.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(other, tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(other, tmp_path)


def test_names_of_older_checkpoints_are_understood(family, tmp_path):
    """LeRobot renames some keys while it loads; so must a loader that replaces it."""
    policy, other = family.policy(), family.policy()
    if not hasattr(policy, "_fix_pytorch_state_dict_keys"):
        return  # SmolVLA's names never changed
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    old = {name.removeprefix("model."): value.clone() for name, value in policy.state_dict().items()}
    kind = policy.config.type
    if kind == "pi0":
        old = {name.replace("action_time_mlp_", "time_mlp_"): value for name, value in old.items()}
    elif kind == "pi05":
        old = {name.replace("time_mlp_", "action_time_mlp_"): value for name, value in old.items()}
        old["state_proj.weight"] = torch.zeros(1)  # of π0, dropped on purpose
    embedding = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    old.pop(embedding, None)  # taken from the head
    expected = policy.state_dict()
    expected[f"model.{embedding}"] = expected["model.paligemma_with_expert.paligemma.lm_head.weight"]
    save_file(old, tmp_path / "model.safetensors")
    load_checkpoint(other, tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize(("height", "width"), [(48, 96), (90, 60), (64, 64)])
def test_image_region_is_where_the_policy_puts_the_image(family, height, width):
    policy = family.policy()
    wrapped = wrap(policy, 9)
    batch = family.batch(policy)
    key = next(iter(policy.config.image_features))
    batch[key] = torch.ones(len(batch[key]), 3, height, width)
    pixels = []

    def keep(module, args, kwargs):
        pixels.append((args[0] if args else kwargs["pixel_values"])[0, 0])

    wrapped.adapter.stages(policy).vision.register_forward_pre_hook(keep, with_kwargs=True)
    act(wrapped, family, batch)
    # White is 1 after normalisation; padding is not.
    white = (pixels[0] > 0.99).nonzero()
    (top, left), (bottom, right) = white.amin(0).tolist(), (white.amax(0) + 1).tolist()
    size = pixels[0].shape[0]
    expected = (left / size, top / size, right / size, bottom / size)
    assert wrapped.adapter.image_region(policy, height, width) == pytest.approx(expected)


def test_attaching_twice_is_refused(family):
    wrapped = wrap(family.policy(), 9)
    with pytest.raises(UnsupportedPolicyError, match="detach it first"):
        wrapped.adapter.attach(wrapped.base, wrapped.seam)


def test_more_tokens_than_the_dense_policy_has_are_refused(family):
    with pytest.raises(BudgetError, match=str(family.tokens_per_camera)):
        wrap(family.policy(), family.tokens_per_camera + 1)


def test_the_budget_may_change_at_run_time(family):
    policy = family.policy()
    wrapped = train_offsets(wrap(policy, 16, num_tokens_max=36))
    batch = family.batch(policy)
    seen = family.spy(policy)
    lengths = []
    for k in (36, 16, 1):
        wrapped.num_tokens = k
        assert torch.isfinite(wrapped.predict_action_chunk(dict(batch))).all()
        lengths.append(seen[-1][0])
    assert [a - b for a, b in itertools.pairwise(lengths)] == [20, 15]


def test_blind_hands_over_no_visual_token(family):
    policy = family.policy(cameras=2)
    batch = family.batch(policy)
    wrapped = wrap(policy, 1, reducer="blind")
    loss, chunk, _ = run(wrapped, family, batch)
    for key in policy.config.image_features:
        batch[key] = torch.rand_like(batch[key])
    blind_loss, blind_chunk, _ = run(wrapped, family, batch)
    assert torch.equal(blind_loss, loss)
    assert torch.equal(blind_chunk, chunk)
    assert wrapped.num_tokens == 0
    with pytest.raises(BudgetError, match="blind"):
        wrapped.num_tokens = 5


def test_saved_weights_are_loaded_exactly(family, tmp_path):
    wrapped = train_offsets(wrap(family.policy(), 16, num_tokens_max=25))
    batch = family.batch(wrapped.base)
    wrapped.save_pretrained(tmp_path)
    other = wrap(family.policy(), 16, num_tokens_max=25)
    assert not torch.equal(run(other, family, batch)[0], run(wrapped, family, batch)[0])
    load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(run(other, family, batch)[0], run(wrapped, family, batch)[0])
    config = PreTrainedConfig.from_pretrained(tmp_path)
    assert (config.num_tokens, config.max_tokens, config.base.type) == (16, 25, wrapped.base.config.type)


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
        images = torch.zeros_like(batch[key])
        for bright in (0.0, 1.0):
            cell_height, cell_width = images.shape[-2] // height, images.shape[-1] // width
            rows = slice(row * cell_height, (row + 1) * cell_height)
            columns = slice(column * cell_width, (column + 1) * cell_width)
            images[..., rows, columns] = bright
            wrapped.predict_action_chunk(dict(batch) | {key: images.clone()})
        change = (maps[1] - maps[0]).norm(dim=-1)[0]
        seen_row, seen_column = divmod(int(change.argmax()), width)
        assert max(abs(seen_row - row), abs(seen_column - column)) <= 1
