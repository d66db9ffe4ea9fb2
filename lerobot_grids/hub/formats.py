"""Two formats of a checkpoint: `adapter`, the changes to a pinned base policy, and `full`, which is self-contained.

An adapter holds every tensor of the policy whose bits differ from the base's. With a frozen base those are the
reducer's, a few MB. After training with LoRA they also include the weights with LoRA's products added, not the low-rank
matrices: results were measured with the sum, rounded to the policy's precision, and only that sum reproduces them.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lerobot_policy_grids import GridsConfig
from lerobot_policy_grids.checkpoint import build, load_checkpoint, read_config
from lerobot_policy_grids.checkpoint.digests import digest_of
from lerobot_policy_grids.checkpoint.files import (
    ADAPTER_FILE,
    CARD_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    names_in,
    open_tensors,
)
from lerobot_policy_grids.checkpoint.find import require_complete
from lerobot_policy_grids.checkpoint.load import fetch_base_weights, load_file
from lerobot_policy_grids.checkpoint.manifest import Base, verify_manifest
from lerobot_policy_grids.errors import CheckpointError


def write_adapter(source: Path, target: Path) -> Base:
    """Write a grids checkpoint as an adapter, without a manifest.

    Args:
        source: A complete checkpoint folder, adapter or full.
        target: An empty folder.

    Returns:
        The base policy to name in the manifest.

    Raises:
        CheckpointError: If the source's base is not from the Hub, or cannot be fetched.
    """
    require_complete(source)
    manifest = verify_manifest(source)
    if manifest is not None and manifest.base is not None:
        _take(source, target, ADAPTER_FILE)
        return manifest.base
    config = read_config(source)
    if not isinstance(config, GridsConfig):
        raise CheckpointError(f"{source} is a dense '{config.type}' policy, which has no base; give --format full")
    repo_id, revision = config.base_repo_id, config.base_revision
    if repo_id is None or revision is None:
        raise CheckpointError(f"{source} was not trained from a checkpoint on the Hub; give --format full")
    weights = fetch_base_weights(repo_id, revision)
    base = Base(repo_id, revision, digest_of(weights))
    policy = _on_cpu(config)
    load_file(policy.base, weights)
    changed = _changed(source / WEIGHTS_FILE, policy.state_dict())
    save_file(changed, target / ADAPTER_FILE, metadata={"format": "pt"})
    _take(source, target)
    return base


def write_full(source: Path, target: Path) -> None:
    """Write a checkpoint as a full one, without a manifest.

    Args:
        source: A complete checkpoint folder, adapter or full.
        target: An empty folder.

    Raises:
        CheckpointError: If the base of an adapter cannot be fetched or has changed.
    """
    require_complete(source)
    manifest = verify_manifest(source)
    if manifest is not None and manifest.base is not None:
        policy = _on_cpu(read_config(source))
        load_checkpoint(policy, source)
        policy.save_pretrained(target)
        _take(source, target)
    else:
        _take(source, target, WEIGHTS_FILE)


def _on_cpu(config: Any) -> Any:
    config.device = "cpu"
    return build(config)


def _changed(path: Path, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in a file that belong to the reducer or differ from `before`."""
    changed: dict[str, Tensor] = {}
    with open_tensors(path, "save the checkpoint again") as file:
        for name in file.keys():  # noqa: SIM118 (no dictionary)
            if name not in before:
                raise CheckpointError(
                    f"{path} holds '{name}', which its policy does not have; save the checkpoint again"
                )
            tensor = file.get_tensor(name).to(before[name].dtype)
            if name.startswith("reducer.") or not _same_bits(tensor, before[name]):
                changed[name] = tensor
    return changed


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # Compare bytes, because in torch -0.0 equals 0.0.
    if one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def _take(source: Path, target: Path, weights: str | None = None) -> None:
    """Copy the small files of a checkpoint, and hard-link its weights if the file system supports it."""
    for name in names_in(source):
        if name == weights:
            _link(source / name, target / name)
        elif name not in (ADAPTER_FILE, WEIGHTS_FILE, MANIFEST_FILE, CARD_FILE):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
