"""FLOPs, latency and memory of one `predict_action_chunk`, by stage.

Stages: vision tower, projector, sampler, prefill of the trunk (with everything else that happens once), and the
denoising or decoding steps. The first three are measured around their modules. Steps are told from the prefill by
running with one and with more of them: FLOPs and time grow by the same amount with each.
"""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.families import Stages, get_family
from lerobot_policy_grids.modeling_grids import dense_policy

STAGES = ("vision", "projector", "sampler", "prefill", "steps")


@dataclass
class Cost:
    """What one action chunk costs in one way of running a policy.

    Attributes:
        name: "dense", "K=16", "dense at 112 px", ...
        visual_tokens: Per camera.
        prefix_length: Tokens of the prefix: visual, language, and state where the family has it there.
        flops: Per stage; a multiply-add is 2.
        latency_ms: Per stage and "total", the median over the repetitions; empty where not measured.
        latency_p95_ms: The 95th percentile of the total.
        peak_memory_mib: On a GPU, of its memory; on a CPU, of the whole process so far.
    """

    name: str
    visual_tokens: int
    prefix_length: int
    flops: dict[str, int]
    latency_ms: dict[str, float] = field(default_factory=dict)
    latency_p95_ms: float | None = None
    peak_memory_mib: float | None = None

    @property
    def total_flops(self) -> int:
        """All stages together."""
        return sum(self.flops.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain values, with the total."""
        return asdict(self) | {"total_flops": self.total_flops}


def stages_of(policy: Any) -> Stages:
    """The measurable parts of a policy."""
    base = dense_policy(policy)
    return get_family(base.config.type).stages(base)


@contextmanager
def _steps(policy: Any, count: int) -> Iterator[None]:
    config, name = dense_policy(policy).config, stages_of(policy).steps_field
    saved = getattr(config, name)
    setattr(config, name, count)
    try:
        yield
    finally:
        setattr(config, name, saved)


@contextmanager
def _meter(policy: Any, read: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Add up what `read` gains while the vision tower, the projector and the reducer run."""
    stages = stages_of(policy)
    modules = {"vision": stages.vision, "projector": stages.projector}
    if isinstance(policy, GridsPolicy):
        modules["sampler"] = policy.reducer
    gained = dict.fromkeys(STAGES[:3], 0.0)
    handles = []
    for name, module in modules.items():
        started: list[float] = []
        handles.append(module.register_forward_pre_hook(lambda *args, started=started: started.append(read()) or None))

        def after(*args: Any, name: str = name, started: list[float] = started) -> None:
            gained[name] += read() - started.pop()

        handles.append(module.register_forward_hook(after))
    try:
        yield gained
    finally:
        for handle in handles:
            handle.remove()


def prefix_length(policy: Any, batch: dict[str, Tensor]) -> int:
    """Tokens of the prefix that the trunk gets for `batch`."""
    base, name = dense_policy(policy), stages_of(policy).prefix
    family, embed = get_family(base.config.type), getattr(base.model, name)
    # A family may have put its own in place.
    before = vars(base.model).get(name)
    lengths: list[int] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        prefix = embed(*args, **kwargs)
        lengths.append(family.prefix_length(prefix))
        return prefix

    setattr(base.model, name, spy)
    try:
        with _steps(policy, 1), torch.no_grad():
            policy.predict_action_chunk(dict(batch))
    finally:
        delattr(base.model, name)
        if before is not None:
            setattr(base.model, name, before)
    return lengths[0]


def count_flops(policy: Any, batch: dict[str, Tensor]) -> dict[str, int]:
    """FLOPs of one action chunk by stage, counted by torch's flop counter.

    It knows matrix products, attention and convolutions; normalisation and element-wise operations are not counted.
    """
    vision: Any = stages_of(policy).vision
    # The counter has no formula for every fused attention kernel; written out, it is two matrix products.
    attention = vision.config._attn_implementation
    vision.config._attn_implementation = "eager"
    totals: list[int] = []
    parts: dict[str, float] = {}
    steps = getattr(dense_policy(policy).config, stages_of(policy).steps_field)
    try:
        for count in (1, 2, 3) if stages_of(policy).decodes else (1, 2):
            with _steps(policy, count), FlopCounterMode(display=False) as counter, torch.no_grad():
                with _meter(policy, counter.get_total_flops) as parts:
                    policy.predict_action_chunk(dict(batch))
                totals.append(counter.get_total_flops())
    finally:
        vision.config._attn_implementation = attention
    one, two = totals[:2]
    # A decoding step attends to one token more than the step before it.
    growth = (totals[2] - two) - (two - one) if len(totals) == 3 else 0
    first = (two - one) - growth
    all_steps = steps * first + growth * steps * (steps - 1) // 2
    before = {name: round(value) for name, value in parts.items()}
    return before | {"prefill": one - first - sum(before.values()), "steps": all_steps}


def measure_latency(policy: Any, batch: dict[str, Tensor], warmup: int, repeats: int) -> tuple[dict[str, float], float]:
    """Wall-clock of one action chunk by stage, with all its steps, synchronised.

    Returns:
        ({stage: median milliseconds, "total": ...}, 95th percentile of the total in milliseconds).
    """
    steps = getattr(dense_policy(policy).config, stages_of(policy).steps_field)
    cuda = next(policy.parameters()).is_cuda

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    def run(count: int) -> dict[str, float]:
        with _steps(policy, count), _meter(policy, now) as parts, torch.inference_mode():
            start = now()
            policy.predict_action_chunk(dict(batch))
            return parts | {"total": now() - start}

    for _ in range(warmup):
        run(steps)
    # Alternating, so that a machine that slows down slows both alike.
    rounds = [(run(steps), run(1)) for _ in range(repeats)]
    full = {name: _quantile([many[name] for many, _ in rounds], 0.5) for name in (*STAGES[:3], "total")}
    per_step = _quantile([many["total"] - one["total"] for many, one in rounds], 0.5) / max(1, steps - 1)
    full["steps"] = per_step * steps
    full["prefill"] = full["total"] - sum(full[name] for name in (*STAGES[:3], "steps"))
    return full, _quantile([many["total"] for many, _ in rounds], 0.95)


def _quantile(values: list[float], quantile: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(quantile))


def peak_memory_mib(policy: Any) -> float:
    """Peak memory: of the GPU since its counter was reset, or of this process so far."""
    if next(policy.parameters()).is_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
