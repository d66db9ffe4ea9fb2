"""What coordinates depend on, and what they must not."""

import torch

from driving import train_offsets, wrap


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
    for key in (*([language] if family.reads_language else []), "observation.state", image):
        flipped = batch[key].flip(0)
        assert not torch.equal(coordinates({key: flipped}), reference), key


def test_masked_language_tokens_do_not_move_the_coordinates(instructed_family):
    wrapped = train_offsets(wrap(instructed_family.policy(), 9))
    batch = instructed_family.batch(wrapped.base)
    mask = batch["observation.language.attention_mask"].bool()
    assert not mask.all()
    changed = torch.where(mask, batch["observation.language.tokens"], 7)
    seen = []
    wrapped.reducer.register_forward_hook(lambda m, i, output: seen.append(output.coordinates))
    for tokens in (batch["observation.language.tokens"], changed):
        wrapped.predict_action_chunk(dict(batch) | {"observation.language.tokens": tokens})
    assert torch.equal(seen[0], seen[1])


def test_a_missing_camera_is_told_apart_from_the_present_ones(resizing_family):
    wrapped = train_offsets(wrap(resizing_family.policy(cameras=3), 9))
    batch = resizing_family.batch(wrapped.base)
    cameras = list(wrapped.base.config.image_features)
    ids = []
    wrapped.reducer.register_forward_hook(lambda m, inputs, o: ids.append(inputs[1]["camera"].unique().tolist()))
    del batch[cameras[1]]
    chunk = wrapped.predict_action_chunk(batch)
    assert torch.isfinite(chunk).all()
    assert ids == [[0, 2]]
