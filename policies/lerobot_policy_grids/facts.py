"""What a checkpoint folder says about itself, for its card."""

from pathlib import Path
from typing import Any

from lerobot_grids_cards import PolicyFacts

from .base_choice import GRIDS_TYPE
from .files import CONFIG_FILE, PICTURE_FILE, read_json
from .manifest import FORMATS, read_manifest


def read_facts(folder: Path, **known: Any) -> PolicyFacts:
    """The facts of a checkpoint, dense or grids.

    Args:
        folder: The checkpoint; without a manifest it is a full one.
        **known: What the folder does not say: repo_id, dataset, licence, training, tags.

    Raises:
        CheckpointError: If its configuration or its manifest cannot be read.
    """
    config, manifest = read_json(folder / CONFIG_FILE), read_manifest(folder)
    grids = config["type"] == GRIDS_TYPE
    base = None if manifest is None else manifest.base
    features = config["input_features"] or {}
    return PolicyFacts(
        family=(config["base"] if grids else config)["type"],
        num_tokens=_tokens(config) if grids else None,
        num_tokens_max=config["num_tokens_max"] if grids else None,
        reducer=config["reducer"] if grids else "",
        cameras=[name for name, feature in features.items() if feature["type"] == "VISUAL"],
        format=FORMATS[0] if manifest is None else manifest.format,
        base_repo_id=config.get("base_repo_id"),
        base_revision=config.get("base_revision"),
        base_sha256=None if base is None else base.sha256,
        picture=(folder / PICTURE_FILE).is_file(),
        **known,
    )


def _tokens(config: dict[str, Any]) -> int:
    return 0 if config["reducer"] == "blind" else config["num_tokens"]
