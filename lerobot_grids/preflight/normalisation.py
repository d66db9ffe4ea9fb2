"""Do the processors have statistics for everything that they are to normalise?"""

from typing import Any

from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep

from lerobot_policy_grids.checkpoint.statistics import find_fault

from .findings import Finding


def check_normalisation(*pipelines: Any) -> list[Finding]:
    """Find what a pre- and a post-processor would leave as it is, or turn into nonsense."""
    findings = []
    for step in (step for pipeline in pipelines for step in pipeline.steps):
        if isinstance(step, (NormalizerProcessorStep, UnnormalizerProcessorStep)):
            features = {name: (feature.type.value, tuple(feature.shape)) for name, feature in step.features.items()}
            modes = {kind.value: mode.value for kind, mode in step.norm_map.items()}
            fault = find_fault(features, modes, step.stats or {})
            if fault is not None:
                findings.append(Finding(f"the dataset's statistics: normalisation {fault}; {_advice(fault)}"))
    return list(dict.fromkeys(findings))


def _advice(fault: str) -> str:
    # LeRobot's own commands add quantiles to a dataset that was recorded without, and compute statistics again.
    if "'q" in fault:
        return "add them with: python -m lerobot.scripts.augment_dataset_quantile_stats --repo-id=USER/DATASET"
    return "compute them again with: lerobot-edit-dataset --repo_id USER/DATASET --operation.type recompute_stats"
