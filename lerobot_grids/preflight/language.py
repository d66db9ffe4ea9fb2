"""Does every instruction of a dataset reach the policy whole?"""

from collections.abc import Mapping
from typing import Any

from lerobot_policy_grids.instructions import find_cut

from .findings import Finding


def check_tasks(preprocessor: Any, tasks: list[str], statistics: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Find instructions that the tokenizer cuts; an error if two are then the same.

    Args:
        preprocessor: The policy's pre-processor.
        tasks: The dataset's instructions.
        statistics: The dataset's statistics in the policy's names.
    """
    cut = find_cut(preprocessor, tasks, statistics)
    return [] if cut is None else [Finding(cut.line, is_error=cut.is_ambiguous)]
