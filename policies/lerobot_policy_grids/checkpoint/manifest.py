"""grids_manifest.json: the files of a published checkpoint.

The Hub's client checks the size of a download, not its content, so a damaged file of the right size stays in its cache.
The manifest holds every file's SHA-256. For an adapter it also holds the base: repository, commit and SHA-256.
The card and its picture are left out, because people edit them on the Hub.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .digests import digest_of
from .files import ADAPTER_FILE, MANIFEST_FILE, SHOWN, WEIGHTS_FILE, names_in, read_json, size_limit

# Version of the manifest; increase it when a field changes its meaning.
FORMAT_VERSION = 1
FORMATS = ("full", "adapter")

COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Base:
    """The dense policy of an adapter: its repository, its commit, and the SHA-256 of its model.safetensors."""

    repo_id: str
    revision: str
    sha256: str

    def __post_init__(self) -> None:
        for value, pattern, expected in (
            (self.repo_id, REPOSITORY, "user/name"),
            (self.revision, COMMIT, "40 hexadecimal digits of a commit"),
            (self.sha256, _SHA256, "64 hexadecimal digits"),
        ):
            if not isinstance(value, str) or not pattern.fullmatch(value) or ".." in value:
                raise CheckpointError(f"base is {value!r}, expected {expected}; the checkpoint cannot be trusted")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest."""

    files: dict[str, FileRecord]
    base: Base | None = None

    @property
    def format(self) -> str:
        """The format, as in `--format`: "adapter" if it needs a base, otherwise "full"."""
        return FORMATS[self.base is not None]


def write_manifest(folder: Path, base: Base | None = None) -> None:
    """Write the manifest of a finished checkpoint folder.

    Args:
        folder: The checkpoint.
        base: The base of an adapter; None for a full checkpoint.
    """
    names = _listed(folder)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": digest_of(folder / name)} for name in names}
    content = {
        "format_version": FORMAT_VERSION,
        "format": FORMATS[base is not None],
        "base": None if base is None else asdict(base),
        "files": files,
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a checkpoint folder; None if it has none.

    Raises:
        CheckpointError: If it cannot be read, or is not a valid manifest.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        if (folder / ADAPTER_FILE).is_file():
            raise CheckpointError(
                f"{folder} is an adapter without {MANIFEST_FILE}, which names its base; pull it again"
            )
        return None
    content = read_json(path)
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, but this release reads {FORMAT_VERSION}; "
            "upgrade lerobot_policy_grids"
        )
    try:
        manifest = _parse(content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a valid manifest ({error!r}); pull the checkpoint again with --force"
        ) from error
    return manifest


def _parse(content: dict[str, Any]) -> Manifest:
    base = None if content["base"] is None else Base(**content["base"])
    manifest = Manifest({name: FileRecord(**record) for name, record in content["files"].items()}, base)
    for name, record in manifest.files.items():
        if size_limit(name) is None:
            raise ValueError(f"{name!r} is not a file of a checkpoint")
        if type(record.size) is not int or not _SHA256.fullmatch(record.sha256):
            raise ValueError(f"{name!r} has size {record.size!r} and SHA-256 {record.sha256!r}")
    if content["format"] != manifest.format:
        raise ValueError(f"format {content['format']!r} does not match base {manifest.base!r}")
    weights = {WEIGHTS_FILE, ADAPTER_FILE} & manifest.files.keys()
    if weights != {WEIGHTS_FILE if base is None else ADAPTER_FILE}:
        raise ValueError(f"a {manifest.format} checkpoint with weights {sorted(weights)}")
    return manifest


def verify_manifest(folder: Path, *, verify: bool = False) -> Manifest | None:
    """Check every file of a folder against its manifest, and return the manifest; None if there is none.

    Args:
        folder: The checkpoint.
        verify: Whether to hash files again that have not changed since they were last hashed.

    Raises:
        CheckpointError: If a file is missing, damaged or not listed.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    advice = "the checkpoint is damaged or was changed; pull it again with --force"
    present = set(_listed(folder))
    missing, unlisted = sorted(manifest.files.keys() - present), sorted(present - manifest.files.keys())
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {MANIFEST_FILE} lists; {advice}")
    if unlisted:
        raise CheckpointError(f"{folder} holds {', '.join(unlisted)}, which {MANIFEST_FILE} does not list; {advice}")
    for name, expected in manifest.files.items():
        size = (folder / name).stat().st_size
        if size != expected.size:
            raise CheckpointError(f"{folder / name} has {size} bytes, expected {expected.size}; {advice}")
        seen = digest_of(folder / name, verify=verify)
        if seen != expected.sha256:
            raise CheckpointError(f"{folder / name} has SHA-256 {seen}, expected {expected.sha256}; {advice}")
    return manifest


def _listed(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if name not in (MANIFEST_FILE, *SHOWN)]
