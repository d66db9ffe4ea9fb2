"""Do the processors have statistics for everything that they are to normalise?"""

from collections.abc import Mapping
from typing import Any

from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_grids.checkpoint.statistics import advise, find_fault
from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.processor_grids import normalisation_faults

from .findings import Finding


def check_normalisation(*pipelines: Any) -> list[Finding]:
    """Find what a pre- and a post-processor would leave as it is, or turn into nonsense."""
    return [
        Finding(f"the dataset's statistics: normalisation {fault}; {advise(fault)}")
        for fault in normalisation_faults(*pipelines)
    ]


def check_statistics(config: Any, statistics: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """`check_normalisation` before there are processors, which need a tokenizer.

    Args:
        config: Configuration of the policy, with the dataset's features.
        statistics: The dataset's statistics in the policy's names.
    """
    base = base_config(config)
    read = {**(config.input_features or {}), **(config.output_features or {})}
    vectors = {name: (f.type.value, tuple(f.shape)) for name, f in read.items() if name in (OBS_STATE, ACTION)}
    modes = {getattr(kind, "value", kind): getattr(m, "value", m) for kind, m in base.normalization_mapping.items()}
    fault = find_fault(vectors, modes, statistics)
    return [] if fault is None else [Finding(f"the dataset's statistics: normalisation {fault}; {advise(fault)}")]
