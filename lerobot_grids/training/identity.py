"""The options that a resumed run must share with the original run."""

import json
from typing import Any

import draccus

from lerobot_policy_grids.errors import CheckpointError

from .averaging import TrainedWeightsAverage

# Fields of the policy's configuration that may change: the device and the length of the run.
CHANGES = ("device", "schedule_steps")


def identity_of(module: Any) -> dict[str, Any]:
    """All options that change the result of a training step, by names that users know."""
    trainer, data = module.trainer, module.trainer.datamodule
    averages = [callback.decay for callback in trainer.callbacks if isinstance(callback, TrainedWeightsAverage)]
    # Convert to plain values, because a training state holds nothing else.
    configuration = _flat(json.loads(json.dumps(draccus.encode(module.policy.config), default=str)), "policy.config")
    return {
        # Include the choices of "auto" and of the recipe.
        **dict(module.hparams) | {"train": module.trainable.train, "lr": module.lr},
        **{f"data.{name}": value for name, value in data.identity.items()},
        "ema": averages[0] if averages else None,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        **{name: value for name, value in configuration.items() if name.rpartition(".")[2] not in CHANGES},
    }


def require_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless both are equal; the message names the differences."""
    changed = [f"{name} {before.get(name)} (now {now[name]})" for name in now if before.get(name) != now[name]]
    if changed:
        raise CheckpointError(
            f"the run to resume had {', '.join(changed)}; give the same options as before, or another --output"
        )


def _flat(content: Any, name: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        return {name: content}
    return {key: value for part, inner in content.items() for key, value in _flat(inner, f"{name}.{part}").items()}
