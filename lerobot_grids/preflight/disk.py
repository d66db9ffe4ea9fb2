"""Is there room for a run's checkpoints?"""

import shutil
from pathlib import Path
from typing import Any

from .findings import Finding, warning

GIB = 2**30


def check_disk(output: Path, policy: Any) -> list[Finding]:
    """Compare the free space where a run is written with the size of its checkpoints.

    A checkpoint, and a training state with the weights and Adam's two moments of what is trained; of each an old and a
    new version exist for a moment.
    """
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in policy.parameters()]
    weights, trained = sum(size for size, _ in sizes), sum(size for size, grad in sizes if grad)
    once = 2 * weights + 2 * trained
    place = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    text = f"{place} has {free / GIB:.1f} GiB free"
    if free < once:
        line = f"{text}; a checkpoint and its training state need {once / GIB:.1f} GiB; free some, or give --output"
        return [Finding(line)]
    if free < 2 * once:
        return [warning(f"{text}; two versions of the checkpoint and its training state need {2 * once / GIB:.1f} GiB")]
    return []
