"""Do the processors have statistics for everything that they are to normalise?"""

from typing import Any

from lerobot_policy_grids.checkpoint.statistics import advise
from lerobot_policy_grids.processor_grids import normalisation_faults

from .findings import Finding


def check_normalisation(*pipelines: Any) -> list[Finding]:
    """Find what a pre- and a post-processor would leave as it is, or turn into nonsense."""
    return [
        Finding(f"the dataset's statistics: normalisation {fault}; {advise(fault)}")
        for fault in normalisation_faults(*pipelines)
    ]
