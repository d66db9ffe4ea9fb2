"""Families that are wrong on purpose. The contract suite must notice each of them."""

from functools import partial

import torch

from lerobot_policy_grids.families import families


def wrong_mask(images, masks):
    """The last camera's tokens are masked away."""
    return images, [*masks[:-1], torch.zeros_like(masks[-1])]


def dropped_camera(images, masks):
    """The last camera is left out."""
    return (images[:-1], masks[:-1]) if len(images) > 1 else (images, masks)


class Transposed(torch.nn.Module):
    """The reducer reads the feature map with rows and columns exchanged."""

    def __init__(self, reducer):
        super().__init__()
        self.reducer = reducer

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "reducer" else getattr(self.reducer, name)

    def forward(self, feature_map, context, num_tokens, camera):
        return self.reducer(feature_map.transpose(1, 2), context, num_tokens, camera)


def swapped_cameras(tokens, seam):
    """The first camera has the last one's tokens."""
    return tokens[::-1]


def shifted_tokens(tokens, seam):
    """Each token is in the place of the next one."""
    return [camera.roll(1, dims=1) for camera in tokens]


def blank_camera(tokens, seam):
    """The last camera has tokens of zeros."""
    return [*tokens[:-1], torch.zeros_like(tokens[-1])]


def wrong_positions(tokens, seam):
    """Every token says that it was read where another one was."""
    seam.coordinates = [camera.flip(1) for camera in seam.coordinates or []]
    return tokens


def first_rows(features, placed):
    """What the trunk adds in a later layer is of the first rows of every map, wherever the tokens were read."""
    maps = features.chunk(len(placed.coordinates))
    pairs = zip(maps, placed.coordinates, strict=True)
    return torch.cat([camera[:, : points.shape[1]] for camera, points in pairs], dim=1).flatten(0, 1)


AT_SEAM = (swapped_cameras, shifted_tokens, blank_camera, wrong_positions)


def _tokens(seam, change, *args):
    return change(type(seam).tokens(seam, *args), seam)


def _transposed(get_reducer):
    return Transposed(get_reducer())


def _run(original, change, batch):
    return change(*original(batch))


def _without_last(seam, original, images, *arguments):
    """`dropped_camera` where a family has no masks: the last camera's tokens do not arrive."""
    tokens = original(images, *arguments)
    if len(tokens) > 1:
        seam.coordinates = seam.coordinates and seam.coordinates[:-1]
        tokens = tokens[:-1]
    return tokens


def _broken_attach(attach, name, policy, seam):
    attach(policy, seam)
    if name == "transposed_grid":
        seam._get_reducer = partial(_transposed, seam._get_reducer)
        return
    if globals()[name] in AT_SEAM:
        seam.tokens = partial(_tokens, seam, globals()[name])
        return
    if not hasattr(policy, "prepare_images") and not hasattr(policy, "_preprocess_images"):
        seam.tokens = partial(_without_last, seam, seam.tokens)
        return
    method = "prepare_images" if hasattr(policy, "prepare_images") else "_preprocess_images"
    setattr(policy, method, partial(_run, getattr(policy, method), globals()[name]))


def install(name, monkeypatch):
    """Until the end of the test every family is the mutant."""
    for family in families().values():
        monkeypatch.setattr(family, "attach", partial(_broken_attach, family.attach, name))
