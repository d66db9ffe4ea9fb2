"""What coordinates depend on, and what they must not."""

import pytest
import torch

from driving import require_optional_cameras, train_offsets, wrap


def test_coordinates_depend_on_instruction_state_and_image(family):
    wrapped = train_offsets(wrap(family.policy(), 9))
    batch = family.batch(wrapped.base)

    def coordinates(changed):
        seen = []
        handle = wrapped.reducer.register_forward_hook(lambda m, i, output: seen.append(output.coordinates))
        wrapped.predict_action_chunk(dict(family.changed(wrapped.base, batch, **changed)))
        handle.remove()
        return seen[0]

    reference = coordinates({})
    image = next(iter(wrapped.base.config.image_features))
    for key in (*([family.language] if family.reads_language else []), "observation.state", image):
        flipped = batch[key].flip(0) if isinstance(batch[key], torch.Tensor) else batch[key][::-1]
        assert not torch.equal(coordinates({key: flipped}), reference), key


def test_masked_language_tokens_do_not_move_the_coordinates(instructed_family):
    family = instructed_family
    wrapped = train_offsets(wrap(family.policy(), 9))
    batch = family.batch(wrapped.base)
    if family.language != "observation.language.tokens":
        pytest.skip("its batch holds no tokens of the instruction alone")
    mask = batch["observation.language.attention_mask"].bool()
    assert not mask.all()
    changed = torch.where(mask, batch["observation.language.tokens"], 7)
    seen = []
    wrapped.reducer.register_forward_hook(lambda m, i, output: seen.append(output.coordinates))
    for tokens in (batch["observation.language.tokens"], changed):
        wrapped.predict_action_chunk(dict(batch) | {"observation.language.tokens": tokens})
    assert torch.equal(seen[0], seen[1])


def test_a_missing_camera_is_told_apart_from_the_present_ones(resizing_family):
    family = resizing_family
    require_optional_cameras(family)
    wrapped = train_offsets(wrap(family.policy(cameras=3), 9))
    batch = family.batch(wrapped.base)
    cameras = list(wrapped.base.config.image_features)
    ids = []
    wrapped.reducer.register_forward_hook(lambda m, inputs, o: ids.append(inputs[1]["camera"].unique().tolist()))
    del batch[cameras[1]]
    chunk = wrapped.predict_action_chunk(batch)
    assert torch.isfinite(chunk).all()
    assert ids == [[0, 2]]
