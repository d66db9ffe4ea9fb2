"""Checks before a push: weights are finite, and no file holds tokens or paths of this machine."""

import json
import re
from pathlib import Path

import torch
from huggingface_hub import get_token

from lerobot_policy_grids.checkpoint.files import CONFIG_FILE, open_tensors, read_json
from lerobot_policy_grids.errors import CheckpointError, GridsError

_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{20,}")
# A path of this machine, and what may be before it. The two slashes of a URL begin none.
_PATH = re.compile(
    rb"""(?:^|[\s"'`(=:,;\[{|>])(file:/+[\w.-]+|/(?:[\w.-]+/)+[\w.-]*|~(?:[A-Za-z_][\w.-]*)?/[\w.-]+"""
    rb"""|[A-Za-z]:(?:/|\\{1,2})\w+)""",
    re.MULTILINE,
)


def scrub_config(folder: Path) -> None:
    """Remove from a checkpoint's configuration where it was loaded from and where it was pushed."""
    path = folder / CONFIG_FILE
    content = read_json(path)
    for config in filter(None, (content, content.get("base"))):
        for name in ("pretrained_path", "pretrained_revision", "repo_id", "private"):
            if name in config:
                config[name] = None
    path.write_text(json.dumps(content, indent=4))


def check_outgoing(folder: Path) -> None:
    """Check every file of a folder before it is pushed.

    Raises:
        CheckpointError: If weights are damaged, or hold NaN or infinity.
        GridsError: If a file, or the header of a weights file, holds a token or a path of this machine.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix == ".safetensors":
            _require_finite(path)
        _refuse_private(path)


def _require_finite(path: Path) -> None:
    with open_tensors(path, "save the checkpoint again", shown=path.name) as file:
        for name in file.keys():  # noqa: SIM118 (no dictionary)
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(f"{path.name}: '{name}' holds NaN or infinity; push an earlier checkpoint")


def _refuse_private(path: Path) -> None:
    """Raise `GridsError` if a file, or the header of a weights file, holds a token or a path of this machine."""
    data = path.read_bytes() if path.suffix != ".safetensors" else _header(path)
    token = get_token()
    if _TOKEN.search(data) or (token and token.encode() in data):
        raise GridsError(f"{path.name} holds an access token; revoke it, remove it from the checkpoint, then push")
    home = str(Path.home()).encode() + b"/"
    found = _PATH.search(data) if path.suffix in (".json", ".md", ".safetensors") else None
    if found or (home != b"//" and home in data):
        seen = found[1].decode() if found else "your home folder"
        raise GridsError(f"{path.name} names {seen}, a path of this machine; remove it from the checkpoint, then push")


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
