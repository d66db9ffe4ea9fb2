"""Training states on disk: written atomically and checked before use; the previous one is kept.

Lightning's own writer writes to the system's temporary folder. If that is another file system, it then copies the file
over the old one, and a process that is killed during the copy loses both.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from lerobot_policy_grids.checkpoint import atomic_file
from lerobot_policy_grids.errors import CheckpointError

# Inside a run's output folder, newest first.
STATE_FILES = ("training_state/last.ckpt", "training_state/previous.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, sync and rename; the old target becomes `previous.ckpt`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a state so that `path` or the previous state is complete, even if the process is killed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
            if not is_whole(partial):
                raise CheckpointError(
                    f"{path} cannot be read back after it was written; the last training state is kept, check the disk"
                )
            if path.exists():
                path.replace(path.with_name(Path(STATE_FILES[1]).name))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load tensors and plain values; torch refuses a file that would run code."""
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state


def is_whole(path: Path) -> bool:
    """Whether a state is undamaged, by the checksums in its archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def find_state(output: Path) -> tuple[Path, list[Path]]:
    """Find (the newest undamaged training state of a run, damaged states that are newer).

    Raises:
        CheckpointError: If there is no undamaged state.
    """
    present = [path for path in (output / name for name in STATE_FILES) if path.is_file()]
    if not present:
        raise CheckpointError(f"nothing to resume: {output / STATE_FILES[0]} does not exist; start without --resume")
    for number, path in enumerate(present):
        if is_whole(path):
            return path, present[:number]
    raise CheckpointError(
        f"{' and '.join(str(path) for path in present)} damaged; start again with another --output and "
        f"--policy {output}/pretrained_model"
    )
