"""What a pushed checkpoint of these tests consists of."""

from lerobot_grids.hub.formats import write_adapter, write_full
from lerobot_policy_grids.checkpoint.manifest import write_manifest

REPO = "me/push-16"
FULL = {
    "README.md",
    "config.json",
    "grids_manifest.json",
    "model.safetensors",
    "policy_postprocessor.json",
    "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    "policy_preprocessor.json",
    "policy_preprocessor_step_5_normalizer_processor.safetensors",
}
ADAPTER = FULL - {"model.safetensors"} | {"grids_adapter.safetensors"}
KEPT = {".gitattributes"}


def on_hub(hub, name=REPO):
    return set(hub.files(name)) - KEPT


def as_adapter(source, folder):
    """A checkpoint as an adapter, with its manifest."""
    folder.mkdir()
    write_manifest(folder, write_adapter(source, folder))
    return folder


def as_full(source, folder):
    """A checkpoint as a self-contained one, with its manifest."""
    folder.mkdir()
    write_full(source, folder)
    write_manifest(folder)
    return folder
