"""What a command line calls a policy, a budget or a device."""

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import torch

from lerobot_policy_grids.checkpoint import CHECKPOINT_FOLDER, find_checkpoint, read_config, resolve_checkpoint
from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import BudgetError, CheckpointError, GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families import REFUSED, families, get_family

from ..budgets import budget_fault

Tokens = int | Literal["dense"]


def parse_tokens(tokens: str | int) -> Tokens:
    """A token budget from a command line: a positive number, or "dense".

    Raises:
        BudgetError: If it is neither.
    """
    text = str(tokens).strip()
    fault = budget_fault(text)
    if fault is not None:
        raise BudgetError(fault)
    return "dense" if text == "dense" else int(text)


def sources() -> dict[str, str | Path | None]:
    """What `--policy` may be besides a folder or a Hub id: names, and where each one's dense policy comes from."""
    return {name: place for family in families().values() for name, place in family.sources.items()}


def find_source(source: str, *, weights: bool = True) -> Path | None:
    """The folder of the checkpoint that `--policy` names, fetched if on the Hub; None for one that has no weights yet.

    Args:
        source: A name, a folder or a Hub id.
        weights: Whether the weights are fetched, too.

    Raises:
        UnsupportedPolicyError: If it is no family, folder or Hub id.
        CheckpointError: If there is no checkpoint, or the Hub does not give it.
    """
    known = sources()
    if source in REFUSED and not Path(source).exists():
        get_family(source)
    if source not in known and not Path(source).exists() and "/" not in source:
        near = get_close_matches(source.lower(), [*known, *REFUSED], 1)
        if near and near[0] in REFUSED:
            get_family(near[0])
        meant = f"did you mean {near[0]}? Otherwise give" if near else "give"
        raise UnsupportedPolicyError(
            f"policy '{source}' is unknown; {meant} a family ({', '.join(known)}), a checkpoint folder, "
            "or a Hub id like user/name or user/name@revision"
        )
    place = known.get(source, source)
    if isinstance(place, Path):
        return resolve_checkpoint(place)
    return None if place is None else find_checkpoint(place, weights=weights)


def find_weights(source: str, *, weights: bool = True) -> Path:
    """`find_source`, of a policy that has weights.

    Raises:
        CheckpointError: If it has none.
    """
    folder = find_source(source, weights=weights)
    if folder is None:
        raise CheckpointError(
            f"'{source}' is a family with random weights; give the checkpoint folder of a trained policy"
        )
    return folder


def source_type(source: str) -> str:
    """LeRobot's type of the dense policy that `--policy` names, or of the one inside a grids checkpoint.

    Raises:
        UnsupportedPolicyError: If there is none, or it is not supported.
        CheckpointError: If it cannot be read or fetched.
    """
    folder = find_source(source, weights=False)
    if folder is None:
        return named_type(source)
    kind: str = base_config(read_config(folder)).type
    get_family(kind)
    return kind


def named_type(name: str) -> str:
    """LeRobot's type of the dense policy that a family's name stands for.

    Raises:
        UnsupportedPolicyError: If no family has that name.
    """
    for kind, family in families().items():
        if name in family.sources:
            return kind
    raise UnsupportedPolicyError(f"'{name}' is the name of no family; choose from {', '.join(sources())}")


def checked_device(device: str) -> str:
    """The device, if it exists here.

    Raises:
        GridsError: If torch knows no such device, or does not see it.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GridsError(f"device '{device}' is not available here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def short_name(policy: str, *settings: str | int | None) -> str:
    """What to call the results of a checkpoint that is run with some settings."""
    path = Path(policy)
    name = path.parent.name if path.name == CHECKPOINT_FOLDER else path.name
    return "-".join([name, *(str(setting) for setting in settings if setting is not None)])
