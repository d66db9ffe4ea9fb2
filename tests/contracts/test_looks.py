"""Where every family looks: known without acting, and drawn where the camera's image was read."""

import numpy as np
import pytest
import torch

from driving import act, train_offsets, wrap
from lerobot_grids.looks.drawing import TRUE, canvas_size, draw
from lerobot_grids.looks.points import look
from lerobot_policy_grids.families.seam import Seam
from lerobot_policy_grids.looks import Points

MARK = (0.7, 0.3)


def wide_and_tall(family):
    """A policy with two cameras that are not square, and the options that letterbox them."""
    size = family.image_size
    options = {} if family.resizes_with_padding else {"resize_imgs_with_padding": (size, size)}
    shapes = [(size // 2, size), (size, round(0.6 * size))]
    if family.has_one_shape or not family.resizes:
        shapes[1] = shapes[0]
    return family.policy(shapes=shapes, **options)


def test_looking_is_what_acting_reads_and_changes_nothing(family):
    policy = wide_and_tall(family)
    wrapped = train_offsets(wrap(policy, 6))
    batch = family.batch(policy)
    before = act(wrapped, batch)
    # Some families always remember, for their positions.
    remembers = wrapped.seam.coordinates is not None
    looks = look(wrapped, batch)
    assert "tokens" not in vars(wrapped.seam)
    assert (wrapped.seam.coordinates is not None) == remembers
    wrapped.seam.remember_coordinates()
    torch.testing.assert_close(act(wrapped, batch), before, rtol=0, atol=0)
    assert list(looks) == list(policy.config.image_features)
    for seen, read in zip(looks.values(), wrapped.seam.coordinates, strict=True):
        np.testing.assert_array_equal(np.stack([points.coordinates for points in seen]), read.float().numpy())


@pytest.mark.parametrize("reducer", ["fastv", "sparsevlm"])
def test_what_the_trunk_keeps_is_sorted_by_camera(pruned_family, reducer):
    """Each camera's points are cell centres, in raster order; together they are K per camera."""
    policy = pruned_family.policy(cameras=2)
    wrapped = wrap(policy, 5, reducer)
    kept = []
    wrapped.reducer.register_forward_hook(lambda module, inputs, pruned: kept.append(pruned.places))
    looks = look(wrapped, pruned_family.batch(policy))
    rows, columns = wrapped.reducer.token_grid
    for frame, places in enumerate(kept[0].tolist()):
        for camera, seen in enumerate(looks.values()):
            own = [place - camera * rows * columns for place in places]
            own = [place for place in own if 0 <= place < rows * columns]
            expected = [((i % columns + 0.5) / columns, (i // columns + 0.5) / rows) for i in own]
            np.testing.assert_allclose(seen[frame].coordinates, np.array(expected).reshape(-1, 2), atol=1e-6)
    assert sum(len(seen[0].coordinates) for seen in looks.values()) == 10


def test_a_point_is_drawn_where_lerobots_letterbox_put_the_pixels(family, monkeypatch):
    """A mark in the camera's image is found in what LeRobot hands the vision tower, and its point is drawn on it."""
    if family.makes_patches:
        pytest.skip("images of this family become patches in its pre-processor")
    policy = wide_and_tall(family)
    wrapped = wrap(policy, 4)
    batch = family.batch(policy)
    handed = []
    tokens = Seam.tokens

    def spy(seam, images, *args, **kwargs):
        handed.extend(images)
        return tokens(seam, images, *args, **kwargs)

    monkeypatch.setattr(Seam, "tokens", spy)
    dark = {name: torch.zeros_like(batch[name]) for name in policy.config.image_features}
    marked = {name: image.clone() for name, image in dark.items()}
    for image in marked.values():
        height, width = image.shape[-2:]
        row, column = round(MARK[1] * height), round(MARK[0] * width)
        image[..., row - 3 : row + 3, column - 3 : column + 3] = 1
    looks = look(wrapped, batch | dark)
    look(wrapped, batch | marked)
    for number, (name, seen) in enumerate(looks.items()):
        # What the mark changed in the vision tower's input, and the middle of that.
        light = (handed[number + 2][0] - handed[number][0]).abs().sum(0).double().numpy()
        rows, columns = np.indices(light.shape)
        x, y = (((axis + 0.5) * light).sum() / light.sum() for axis in (columns, rows))
        found = np.array([[x / light.shape[1], y / light.shape[0]]])
        points = Points(found.astype(np.float32), None, seen[0].region)
        height, width = batch[name].shape[-2:]
        expected = [round(MARK[0] * width) / width, round(MARK[1] * height) / height]
        # LeRobot rounds the size of the resized image to whole pixels.
        np.testing.assert_allclose(points.in_camera()[0], expected, atol=1.5 / min(height, width))
        assert not points.in_padding().any()

        frame = (marked[name][0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        size = canvas_size(points, (height, width), 240)
        mark = draw(frame, Points(np.zeros((0, 2)), None, points.region), side=240).min(-1) > 200
        middle = np.argwhere(mark).mean(0)
        drawn = draw(frame, points, side=240)
        assert drawn.shape[:2] == size[::-1]
        dots = np.argwhere((np.abs(drawn.astype(int) - TRUE) < 12).all(-1))
        np.testing.assert_allclose(dots.mean(0), middle, atol=4)
