"""Write a policy and its processors in the same way with every LeRobot release."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor


def save_policy(policy: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write config.json and model.safetensors of a policy, dense or grids.

    LeRobot's own `save_pretrained` accepts a state in some releases and ignores it in others.

    Args:
        policy: The policy.
        folder: The target folder; it must exist.
        state: The state to write; None takes `policy.state_dict()`.
    """
    if state is None:
        policy.save_pretrained(folder)
        return
    policy.config.save_pretrained(folder)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    # One file, whatever its size.
    save_torch_state_dict(state, str(folder), max_shard_size=max(size, 1))


def save_processors(folder: Path, *processors: Any) -> None:
    """Write a policy's pre- and post-processor; tokenizers are saved by name only.

    Newer LeRobot copies a tokenizer and its code into the checkpoint. Older releases do not look for it there, and
    other people should not have to run that code.

    Args:
        folder: The target folder; it must exist.
        *processors: LeRobot's pipelines.
    """
    for processor in processors:
        with _tokenizers_by_name(processor):
            processor.save_pretrained(folder)


@contextmanager
def _tokenizers_by_name(processor: Any) -> Iterator[None]:
    for step in processor.steps:
        step.save_artifacts = _none
    try:
        yield
    finally:
        for step in processor.steps:
            del step.save_artifacts


def _none(folder: Path) -> dict[str, str]:
    return {}
