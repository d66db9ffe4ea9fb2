"""What to change when a training step does not fit into memory, and what each change would need."""

from collections.abc import Iterator
from typing import Any

import torch

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.errors import GridsError, causes
from lerobot_policy_grids.modeling_grids import dense_policy

from .step_cost import USABLE_SHARE, StepCost, predict_step

# What PyTorch says when the host has no memory left, and what the drivers of GPUs say where it has no exception of its
# own: in a library of CUDA, and on Apple's.
SAID = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory")
# The budget that is advised to a policy with more tokens.
FEW_TOKENS = 16
WITHOUT_FIGURES = (
    "give a smaller --batch_size, fewer --tokens, --model.train reducer+lora or reducer, or "
    "--model.gradient_checkpointing true; lerobot-grids bench --train shows what each saves"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that a GPU or this machine has no memory left."""
    return any(
        isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or any(said in str(cause) for said in SAID)
        for cause in causes(error)
    )


def advise(module: Any, batch_size: int, device: str, memory: int) -> str:
    """Describe in one line what does not fit, and the changes that would, each alone, with their predicted GiB.

    Args:
        module: The `GridsModule` whose training step ran out of memory.
        batch_size: Frames of the step.
        device: Name of the device for the user.
        memory: Memory of the device in bytes.
    """
    seen = f"out of memory on {device}, which has {memory / 2**30:.1f} GiB"
    options = _options(module, batch_size)
    config = dense_policy(module.policy).config
    try:
        now = predict_step(config, **options)
    except (GridsError, NotImplementedError, RuntimeError):
        return f"{seen}; {WITHOUT_FIGURES}"
    seen = f"{seen}: a step of {batch_size} frames needs about {_gib(now.peak)}"
    fitting: list[str] = []
    closer: list[str] = []
    if fits := min(now.largest_batch(memory), batch_size - 1):
        fitting.append(f"--batch_size {fits} ({_gib(now.peak_of(fits))})")
    for flags, change in _changes(config, options):
        try:
            cost = predict_step(config, **options | change)
        except (GridsError, NotImplementedError, RuntimeError):
            continue
        where = fitting if cost.peak <= USABLE_SHARE * memory else closer
        if cost.peak < now.peak:
            where.append(f"{flags} ({_described(cost, memory)})")
    if fitting:
        return f"{seen}; give {' or '.join(fitting)}"
    if closer:
        return f"{seen}; no single change fits, the nearest are {', '.join(closer)}"
    return f"{seen}; {WITHOUT_FIGURES}"


def _options(module: Any, batch_size: int) -> dict[str, Any]:
    """The options of `predict_step` for a module as it is."""
    policy = module.policy
    options = {
        "train": module.trainable.train,
        "batch_size": batch_size,
        "gradient_checkpointing": bool(getattr(dense_policy(policy).config, "gradient_checkpointing", False)),
        "distill": module.distillation is not None,
        "tokens": None,
    }
    if isinstance(policy, GridsPolicy):
        reducer = policy.config.reducer
        # A schedule may have more tokens in some steps.
        tokens = policy.num_tokens if policy.config.schedule == "constant" else reducer.largest
        options |= {"tokens": tokens, "reducer": reducer}
    return options


def _changes(config: Any, options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes, one at a time: (what to give, the options of `predict_step` that differ)."""
    if options["tokens"] is None or options["tokens"] > FEW_TOKENS:
        yield f"--tokens {FEW_TOKENS}", {"tokens": FEW_TOKENS}
    if hasattr(config, "gradient_checkpointing") and not options["gradient_checkpointing"]:
        yield "--model.gradient_checkpointing true", {"gradient_checkpointing": True}
    if options["tokens"] is not None:
        for train in ("reducer+lora", "reducer"):
            if options["train"] == "all" or (train, options["train"]) == ("reducer", "reducer+lora"):
                yield f"--model.train {train}", {"train": train}


def _described(cost: StepCost, memory: int) -> str:
    largest = cost.largest_batch(memory)
    return _gib(cost.peak) + (f", up to {largest} frames" if largest else "")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
