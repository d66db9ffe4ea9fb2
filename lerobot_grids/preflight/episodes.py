"""Are the episodes long enough for the policy's action chunks?"""

from typing import Any

from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

from lerobot_policy_grids.configuration_grids import base_config

from .findings import Finding, warning


def check_episodes(config: Any, meta: LeRobotDatasetMetadata) -> list[Finding]:
    """Warn if most episodes are shorter than an action chunk: then most of each chunk repeats the last action."""
    chunk, lengths = getattr(base_config(config), "chunk_size", 1), list(meta.episodes["length"])
    short = sum(length < chunk for length in lengths)
    if 2 * short <= len(lengths):
        return []
    return [
        warning(
            f"{short} of {len(lengths)} episodes are shorter than the action chunk of {chunk} steps; what lies behind "
            "their end repeats the last action"
        )
    ]
