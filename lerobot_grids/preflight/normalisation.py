"""Do the processors have statistics for everything that they are to normalise?"""

from typing import Any

from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep

from lerobot_policy_grids.checkpoint.statistics import advise, find_fault

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
                findings.append(Finding(f"the dataset's statistics: normalisation {fault}; {advise(fault)}"))
    return list(dict.fromkeys(findings))
