"""Folders of files that small instances are loaded from."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch


def written_once(write: Callable[..., None]) -> Callable[..., Path]:
    """Let a writer of a folder, its first argument, leave one alone that is there, and return the folder.

    Random weights have a seed of their own, and other draws are the same whether the folder was there or not.
    """

    @wraps(write)
    def once(folder: Path, *args: Any, **kwargs: Any) -> Path:
        if not folder.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                write(folder, *args, **kwargs)
        return folder

    return once
