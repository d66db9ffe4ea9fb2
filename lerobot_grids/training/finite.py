"""Stop a run at the first loss or gradient that is not finite, before it reaches the weights."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lerobot_policy_grids.errors import DatasetError, GridsError


def require_finite_loss(loss: Tensor, batch: Mapping[str, Any], step: int) -> None:
    """Check the loss of a training step.

    Args:
        loss: The loss, a scalar.
        batch: The batch as the dataset gave it, with `index` and `episode_index`.
        step: The training step.

    Raises:
        DatasetError: If the loss is not finite and the batch holds such values; the frame and the feature are named.
        GridsError: If the loss is not finite and all values in the batch are.
    """
    if torch.isfinite(loss):
        return
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            bad = ~torch.isfinite(value.reshape(len(value), -1)).all(1)
            if bad.any():
                row = int(bad.int().argmax())
                frame, episode = int(batch["index"][row]), int(batch["episode_index"][row])
                raise DatasetError(
                    f"step {step}: the loss is {float(loss)}, because '{name}' holds NaN or infinity at frame {frame} "
                    f"of episode {episode}; repair or remove that episode, then continue with --resume"
                )
    raise GridsError(
        f"step {step}: the loss is {float(loss)}; continue from the last checkpoint with a lower --model.lr"
    )


def require_finite_weights(parameters: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Check the trained weights before they are saved, because they would replace the last good ones.

    Raises:
        GridsError: If a weight is not finite; the parameter is named.
    """
    trained = {name: parameter.data for name, parameter in parameters if parameter.requires_grad}
    finite = [torch.isfinite(value).all() for value in trained.values()]
    if not finite or torch.stack(finite).all():
        return
    name = next(name for name, good in zip(trained, finite, strict=True) if not good)
    raise GridsError(
        f"step {step}: the weight '{name}' is not finite, so it is not saved; continue from the last checkpoint with a "
        "lower --model.lr"
    )


def require_finite_gradients(parameters: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Check the gradients before an optimiser step.

    Raises:
        GridsError: If a gradient is not finite; the parameter is named.
    """
    gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    # One number for the device to wait for.
    if not gradients or torch.isfinite(nn.utils.get_total_norm(gradients.values())):
        return
    name = next((name for name, value in gradients.items() if not torch.isfinite(value).all()), "all weights together")
    advice = "continue from the last checkpoint with a lower --model.lr"
    raise GridsError(f"step {step}: the gradient of '{name}' is not finite; {advice}")
