"""SHA-256 of files, cached: hashing the weights of a large base policy takes longer than loading them."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from .atomic import atomic_file

# Largest number of cached digests; the oldest are dropped.
MOST = 500


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(path: Path, *, verify: bool = False) -> str:
    """SHA-256 of a file, from a cache if the file has not changed since it was hashed.

    The cache is a file beside the Hub's cache. It identifies a file by inode, size and modification time, so a hard
    link shares the digest.

    Args:
        path: The file.
        verify: Whether to hash the file even if its digest is cached.
    """
    status = path.stat()
    key = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    known = _read()
    if verify or key not in known:
        known[key] = sha256_of(path)
        _write(known)
    return known[key]


def _memory() -> Path:
    return Path(constants.HF_HOME) / "lerobot_grids" / "digests.json"


def _read() -> dict[str, str]:
    with suppress(OSError, ValueError):
        content = json.loads(_memory().read_text())
        if isinstance(content, dict):
            return content
    return {}


def _write(known: dict[str, str]) -> None:
    # Without a cache, files are only hashed again.
    with suppress(OSError):
        _memory().parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(_memory()) as partial:
            partial.write_text(json.dumps(dict(list(known.items())[-MOST:])))
