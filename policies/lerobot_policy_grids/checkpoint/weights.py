"""Load weights only if all keys and shapes match.

LeRobot loads with `strict=False`: a checkpoint with missing keys gives a policy with random weights and a warning in
the log.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .files import open_tensors

# Precisions that weights may be stored in and converted from.
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def load_weights(
    module: nn.Module,
    path: Path,
    rename: Callable[[list[str]], dict[str, str]] | None = None,
    convert: Callable[[str, Tensor], Tensor] | None = None,
    required: str = "",
) -> None:
    """Load a safetensors file into `module`: exactly its keys and shapes, all values finite.

    Tensors are read one by one, so the peak memory is the module plus its largest tensor. As in LeRobot, values are
    converted to the module's precision, but only from float32, bfloat16 or float16.

    Args:
        module: The module to load into.
        path: The safetensors file.
        rename: Maps the file's names to {the module's name: the file's name}, for checkpoints of older
            releases. None takes the names as they are.
        convert: Maps (the file's name, the file's value) to the module's value. None takes values as they are.
        required: Prefix of the names that must be in the file. Other names keep their values if the file lacks them.

    Raises:
        CheckpointError: If something does not fit; the message names the file and the first such keys. The module is
            then partly loaded and must not be used.
    """
    advice = "the file does not belong to this configuration, or is damaged; copy the checkpoint again"
    targets = module.state_dict(keep_vars=True)
    with open_tensors(path, advice) as file:
        names = list(file.keys())
        sources = {name: name for name in names} if rename is None else rename(names)
        for name in sorted(sources.keys() & targets.keys()):
            value = file.get_tensor(sources[name])
            problem = _copy(value if convert is None else convert(sources[name], value), targets[name])
            if problem:
                raise CheckpointError(f"{path}: '{sources[name]}' {problem}; {advice}")
    # Tied weights are stored under one of their names.
    stored = {targets[name].data_ptr() for name in sources.keys() & targets.keys()}
    missing = [
        name for name, target in targets.items() if name.startswith(required) and target.data_ptr() not in stored
    ]
    unexpected = [source for name, source in sources.items() if name not in targets]
    if missing or unexpected:
        shown = [f"missing {_first(missing)}"] if missing else []
        shown += [f"unexpected {_first(unexpected)}"] if unexpected else []
        raise CheckpointError(f"{path}: keys do not match the policy, {' and '.join(shown)}; {advice}")


def require_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse to save weights that no policy could be loaded from.

    Raises:
        CheckpointError: If a value is not finite; its name is in the message.
    """
    for name, value in state.items():
        if value.is_floating_point() and not value.is_meta and not torch.isfinite(value).all():
            raise CheckpointError(
                f"'{name}' holds NaN or infinity, so the policy is not saved; look for NaN in the dataset with "
                "lerobot-grids fit, or train with a lower learning rate from the last checkpoint"
            )


def _copy(source: Tensor, target: Tensor) -> str:
    """Copy the values if they fit; otherwise return the reason."""
    if source.shape != target.shape:
        return f"has shape {tuple(source.shape)}, expected {tuple(target.shape)}"
    if source.dtype != target.dtype and not {source.dtype, target.dtype} <= {*PRECISIONS}:
        return f"has dtype {source.dtype}, expected {target.dtype}"
    if not torch.isfinite(source).all():
        return "holds NaN or infinity"
    with torch.no_grad():
        target.copy_(source)
    return ""


def _first(keys: Iterable[str], limit: int = 3) -> str:
    names = sorted(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{name}'" for name in names[:limit]) + more
