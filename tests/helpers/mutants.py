"""Adapters that are wrong on purpose. The contract suite must notice each of them."""

from functools import partial
from unittest.mock import patch

import torch

from lerobot_policy_grids import modeling_grids
from lerobot_policy_grids.adapters import get_adapter


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

    def forward(self, feature_map, context, num_tokens):
        return self.reducer(feature_map.transpose(1, 2), context, num_tokens)


def _transposed(get_reducer):
    return Transposed(get_reducer())


def _run(original, change, batch):
    return change(*original(batch))


def _broken(name):
    def broken_adapter(policy_type):
        adapter = get_adapter(policy_type)
        attach = adapter.attach

        def broken_attach(policy, seam):
            attach(policy, seam)
            if name == "transposed_grid":
                seam._get_reducer = partial(_transposed, seam._get_reducer)
                return
            method = "prepare_images" if hasattr(policy, "prepare_images") else "_preprocess_images"
            setattr(policy, method, partial(_run, getattr(policy, method), globals()[name]))

        adapter.attach = broken_attach
        return adapter

    return broken_adapter


# Mutant -> tests that must fail with it.
MUTANTS = {
    "wrong_mask": ("test_identity_at_all_tokens_is_exact_for_one_camera", "test_prefix_is_shorter"),
    "dropped_camera": ("test_identity_at_all_tokens_up_to_rounding_for_several", "test_prefix_is_shorter"),
    "transposed_grid": ("test_identity_at_all_tokens_is_exact_for_one_camera",),
}


def install(name):
    """From now on every grids policy gets the mutant."""
    patch.object(modeling_grids, "get_adapter", _broken(name)).start()
