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


def _transposed(get_reducer):
    return Transposed(get_reducer())


def _run(original, change, batch):
    return change(*original(batch))


def _broken_attach(attach, name, policy, seam):
    attach(policy, seam)
    if name == "transposed_grid":
        seam._get_reducer = partial(_transposed, seam._get_reducer)
        return
    method = "prepare_images" if hasattr(policy, "prepare_images") else "_preprocess_images"
    setattr(policy, method, partial(_run, getattr(policy, method), globals()[name]))


def install(name, monkeypatch):
    """Until the end of the test every family is the mutant."""
    for family in families().values():
        monkeypatch.setattr(family, "attach", partial(_broken_attach, family.attach, name))
