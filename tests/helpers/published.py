"""What a pushed checkpoint of these tests consists of."""

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
