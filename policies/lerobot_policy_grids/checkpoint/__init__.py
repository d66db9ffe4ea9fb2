"""Checkpoints: which files they hold, how they are found and loaded, and which published files are trusted."""

from .atomic import atomic_file, atomic_folder
from .find import CHECKPOINT_FOLDER, find_checkpoint, is_published, provenance, read_config, resolve_checkpoint
from .load import build, load_checkpoint
from .trust import check_processors, check_published

__all__ = [
    "CHECKPOINT_FOLDER",
    "atomic_file",
    "atomic_folder",
    "build",
    "check_processors",
    "check_published",
    "find_checkpoint",
    "is_published",
    "load_checkpoint",
    "provenance",
    "read_config",
    "resolve_checkpoint",
]
