"""Do the processors have statistics for everything that they are to normalise?"""

from typing import Any

from lerobot_policy_grids.processor_grids import normalisation_faults

from .findings import Finding


def check_normalisation(*pipelines: Any) -> list[Finding]:
    """Find what a pre- and a post-processor would leave as it is, or turn into nonsense."""
    return [
        Finding(f"the dataset's statistics: normalisation {fault}; {_advice(fault)}")
        for fault in normalisation_faults(*pipelines)
    ]


def _advice(fault: str) -> str:
    # LeRobot's own commands add quantiles to a dataset that was recorded without, and compute statistics again.
    if "'q" in fault:
        return "add them with: python -m lerobot.scripts.augment_dataset_quantile_stats --repo-id=USER/DATASET"
    return "compute them again with: lerobot-edit-dataset --repo_id USER/DATASET --operation.type recompute_stats"
