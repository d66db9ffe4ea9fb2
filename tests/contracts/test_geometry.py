"""Cameras of different shapes: each is sampled inside its own picture, whatever the others look like."""

import pytest
import torch

from driving import ROUNDING, act, require_optional_cameras, wrap
from lerobot_policy_grids.families import get_family

# Height and width, in units of the side of the family's square image.
SHAPES = {"wide": (0.5, 1.0), "tall": (1.0, 0.6), "square": (1.0, 1.0)}


def starts(wrapped, camera):
    """Untrained points of a camera, and its region."""
    region = wrapped.reducer.region_of(camera)
    return wrapped.reducer.anchors(8, camera), region


def inside(points, region):
    left, top, right, bottom = region
    x, y = points.unbind(-1)
    return bool(((x > left) & (x < right) & (y > top) & (y < bottom)).all())


@pytest.fixture
def mixed(resizing_family):
    """A policy with a wide, a tall and a square camera, and its batch."""
    family = resizing_family
    if family.has_one_shape:
        pytest.skip("the grid of this family's tokens follows from the shape of the image")
    size = family.image_size
    options = {} if family.resizes_with_padding else {"resize_imgs_with_padding": (size, size)}
    shapes = [(round(h * size), round(w * size)) for h, w in SHAPES.values()]
    policy = family.policy(shapes=shapes, **options)
    return policy, family.batch(policy)


def test_each_camera_is_read_inside_its_picture(resizing_family, mixed):
    policy, batch = mixed
    wrapped = wrap(policy, 8)
    wrapped.seam.remember_coordinates()
    act(wrapped, batch)
    regions = wrapped.family.cameras(policy)
    assert len(set(regions.values())) == (1 if resizing_family.stretches else 3)
    for camera, region in enumerate(regions.values()):
        points, same = starts(wrapped, camera)
        assert same == region
        assert inside(points, region)
        torch.testing.assert_close(wrapped.seam.coordinates[camera][0], points)


def test_cameras_that_send_no_image_do_not_change_the_others(resizing_family, mixed):
    """Neither one that is absent, nor one that the policy only has by name."""
    require_optional_cameras(resizing_family)
    policy, batch = mixed
    keys = list(policy.config.image_features)
    wrapped = wrap(policy, 8)
    wrapped.seam.remember_coordinates()
    act(wrapped, {key: value for key, value in batch.items() if key != keys[0]})
    assert len(wrapped.seam.coordinates) == 2
    for place, camera in enumerate((1, 2)):
        torch.testing.assert_close(wrapped.seam.coordinates[place][0], starts(wrapped, camera)[0])


def test_shapes_with_the_channels_last_are_understood(family):
    """LeRobot leaves a dataset's (h, w, 3) as it is when the axes have names that it does not know."""
    policy = family.policy()
    key = next(iter(policy.config.image_features))
    regions = []
    for shape in ((3, 48, 96), (48, 96, 3)):
        policy.config.input_features[key].shape = shape
        regions.append(get_family(policy.config.type).cameras(policy))
    assert regions[0] == regions[1]


def test_an_empty_camera_changes_what_it_changes_in_the_dense_policy(resizing_family):
    """`empty_cameras` adds a camera by name; a checkpoint of before can still be loaded."""
    family = resizing_family
    require_optional_cameras(family)
    plain, more = family.policy(), family.policy(empty_cameras=1)
    batch = family.batch(plain)
    assert len(more.config.image_features) == len(plain.config.image_features) + 1
    more.load_state_dict(plain.state_dict())
    dense, dense_more = act(plain, batch), act(more, batch)
    one, other = wrap(plain, family.tokens_per_camera), wrap(more, family.tokens_per_camera)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(act(one, batch), dense, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(act(other, batch), dense_more, atol=ROUNDING, rtol=0)
