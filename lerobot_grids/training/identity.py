"""What a run must have in common with the run that it goes on from: its options, as they are, and what they became."""

import json
from typing import Any

import draccus

from lerobot_policy_grids.errors import CheckpointError

from .averaging import TrainedWeightsAverage

# Of the policy's configuration: where it runs and how long the run is, which may change.
CHANGES = ("device", "schedule_steps")


def identity_of(module: Any) -> dict[str, Any]:
    """Every option that decides what a training step does, by a name that users know."""
    trainer, data = module.trainer, module.trainer.datamodule
    averages = [callback.decay for callback in trainer.callbacks if isinstance(callback, TrainedWeightsAverage)]
    # Plain values, which a training state may hold.
    configuration = _flat(json.loads(json.dumps(draccus.encode(module.policy.config), default=str)), "policy.config")
    return {
        # With what "auto" and the recipe chose, where they were asked.
        **dict(module.hparams) | {"train": module.trainable.train, "lr": module.lr},
        **{f"data.{name}": value for name, value in data.identity.items()},
        "ema": averages[0] if averages else None,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "devices": trainer.world_size,
        **{name: value for name, value in configuration.items() if name.rpartition(".")[2] not in CHANGES},
    }


def require_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless both are the same, naming what differs."""
    changed = [f"{name} {before.get(name)} (now {now[name]})" for name in now if before.get(name) != now[name]]
    if changed:
        raise CheckpointError(
            f"the run to resume had {', '.join(changed)}; give the same options as before, or another --output"
        )


def _flat(content: Any, name: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        return {name: content}
    return {key: value for part, inner in content.items() for key, value in _flat(inner, f"{name}.{part}").items()}
