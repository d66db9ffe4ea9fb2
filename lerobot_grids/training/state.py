"""Training states on disk: written in one step, checked before use, the one before kept.

Lightning's own writer stages a file in the system's temporary folder and copies it over the old one where that is
another file system: a process killed in the copy loses both.
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
    """Writes beside the target, syncs and renames; what the target held becomes `previous.ckpt`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save so that `path` or its predecessor is whole whenever the process dies."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
            if path.exists():
                path.replace(path.with_name(Path(STATE_FILES[1]).name))

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load tensors and plain values; a file that would run code is refused by torch."""
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state


def is_whole(path: Path) -> bool:
    """Whether every byte of a state is as it was written, by the archive's own checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def find_state(output: Path) -> tuple[Path, list[Path]]:
    """(The newest whole training state of a run, the damaged ones that are newer).

    Raises:
        CheckpointError: If there is none.
    """
    present = [path for path in (output / name for name in STATE_FILES) if path.is_file()]
    if not present:
        raise CheckpointError(f"nothing to resume: {output / STATE_FILES[0]} does not exist; start anew")
    for number, path in enumerate(present):
        if is_whole(path):
            return path, present[:number]
    raise CheckpointError(
        f"{' and '.join(str(path) for path in present)} damaged; start anew with another --output and "
        f"--policy {output}/pretrained_model"
    )
