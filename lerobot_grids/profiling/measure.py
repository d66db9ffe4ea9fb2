"""FLOPs, latency and memory of one `predict_action_chunk`, by stage.

Stages: vision tower, projector, sampler, prefill of the trunk (with everything else that runs once), and the denoising
or decoding steps. Hooks around the modules measure the first three. To separate the steps from the prefill, the policy
runs with one step and with more: each step adds the same FLOPs and time.
"""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.families import Stages, get_family
from lerobot_policy_grids.modeling_grids import acting_eagerly, dense_policy

from .counting import flop_counter

STAGES = ("vision", "projector", "sampler", "prefill", "steps")


@dataclass
class Cost:
    """Costs of one action chunk for one variant of a policy.

    Attributes:
        name: "dense", "K=16", "dense at 112 px", ...
        visual_tokens: Visual tokens per camera.
        prefix_length: Number of tokens in the prefix: visual, language, and in some families the state.
        flops: FLOPs per stage; a multiply-add counts as 2.
        num_steps: Integration steps of the flow; None for a policy without one.
        latency_ms: Median milliseconds per stage and in "total"; empty if not measured. The fast path has no stages but
            "prefill", which is all before the steps, and "steps".
        latency_p95_ms: 95th percentile of the total milliseconds.
        peak_memory_mib: Peak memory of the GPU; on a CPU, peak memory of the whole process so far.
        apart: Of the fast path: the largest difference of its first action chunk from the eager one, as a share of the
            range of the actions.
    """

    name: str
    visual_tokens: int
    prefix_length: int
    flops: dict[str, int]
    num_steps: int | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    latency_p95_ms: float | None = None
    peak_memory_mib: float | None = None
    apart: float | None = None

    @property
    def total_flops(self) -> int:
        """FLOPs of all stages together."""
        return sum(self.flops.values())

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and the total as plain values."""
        return asdict(self) | {"total_flops": self.total_flops}


def stages_of(policy: Any) -> Stages:
    """The modules of a policy whose costs are measured."""
    base = dense_policy(policy)
    return get_family(base.config.type).stages(base)


@contextmanager
def _steps(policy: Any, count: int) -> Iterator[None]:
    base, name = dense_policy(policy), stages_of(policy).steps_field
    if name is None:
        yield
        return
    family, saved, option = get_family(base.config.type), _number_of_steps(policy), getattr(base.config, name)
    family.set_steps(base, count)
    try:
        yield
    finally:
        family.set_steps(base, saved)
        # The option may leave it to the checkpoint.
        setattr(base.config, name, option)


def _number_of_steps(policy: Any) -> int:
    """Steps after the prefill; 0 for a policy that predicts its actions in one pass."""
    base, name = dense_policy(policy), stages_of(policy).steps_field
    if name is None:
        return 0
    of_flow = get_family(base.config.type).count_steps(base)
    return int(getattr(base.config, name)) if of_flow is None else of_flow


@contextmanager
def _eager_attention(vision: Any) -> Iterator[None]:
    """The counter lacks some fused attention kernels; eager attention consists of two matrix products."""
    config = getattr(vision, "config", None)
    if config is None:
        yield
        return
    attention = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = attention


@contextmanager
def _meter(policy: Any, read: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Add up the increase of `read` while the vision tower, the projector and the reducer run.

    A reducer that runs inside the vision tower is not counted as vision.
    """
    stages = stages_of(policy)
    modules = {"vision": stages.vision, "projector": stages.projector}
    if isinstance(policy, GridsPolicy):
        modules["sampler"] = policy.reducer
    gained = dict.fromkeys(STAGES[:3], 0.0)
    # When each module that is running began, later by what modules inside it took.
    running: list[float] = []

    def before(*args: Any) -> None:
        running.append(read())

    def after(name: str, *args: Any) -> None:
        took = read() - running.pop()
        gained[name] += took
        running[:] = [began + took for began in running]

    handles = []
    for name, module in modules.items():
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(partial(after, name))]
    try:
        yield gained
    finally:
        for handle in handles:
            handle.remove()


def prefix_length(policy: Any, batch: dict[str, Tensor]) -> int:
    """Number of tokens in the prefix that the trunk gets for `batch`."""
    base = dense_policy(policy)
    place, _, name = stages_of(policy).prefix.rpartition(".")
    family = get_family(base.config.type)
    owner = family.model(base).get_submodule(place)
    embed = getattr(owner, name)
    # The attached family may have replaced this method on the instance; keep its version.
    before = vars(owner).get(name)
    lengths: list[int] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        prefix = embed(*args, **kwargs)
        lengths.append(family.prefix_length(prefix))
        return prefix

    setattr(owner, name, spy)
    try:
        with acting_eagerly(policy), _steps(policy, 1), torch.no_grad():
            policy.predict_action_chunk(dict(batch))
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)
    return lengths[0]


def count_flops(policy: Any, batch: dict[str, Tensor]) -> dict[str, int]:
    """FLOPs of one action chunk by stage, counted by torch's flop counter.

    It counts matrix products, attention and convolutions, but not normalisation and element-wise operations.
    """
    stages = stages_of(policy)
    steps = _number_of_steps(policy)
    counts = () if stages.steps_field is None else (2, 3) if stages.decodes else (2,)
    totals: list[int] = []
    # What a graph replays is not seen.
    with acting_eagerly(policy), _eager_attention(stages.vision):
        for count in (1, *counts):
            with _steps(policy, count), flop_counter() as counter, torch.no_grad():
                with _meter(policy, counter.get_total_flops) as parts:
                    policy.predict_action_chunk(dict(batch))
                totals.append(counter.get_total_flops())
    before = {name: round(value) for name, value in parts.items()}
    if not counts:
        return before | {"prefill": totals[0] - sum(before.values()), "steps": 0}
    one, two = totals[:2]
    # Each decoding step attends to one token more than the previous step.
    growth = (totals[2] - two) - (two - one) if len(totals) == 3 else 0
    first = (two - one) - growth
    all_steps = steps * first + growth * steps * (steps - 1) // 2
    return before | {"prefill": one - first - sum(before.values()), "steps": all_steps}


def measure_latency(policy: Any, batch: dict[str, Tensor], warmup: int, repeats: int) -> tuple[dict[str, float], float]:
    """Wall-clock time of one action chunk by stage, with all its steps; GPUs are synchronised.

    Stages before the prefill are timed only where the policy acts eagerly: the fast path may be one graph.

    Returns:
        ({stage: median milliseconds, "total": ...}, 95th percentile of the total in milliseconds).
    """
    steps = _number_of_steps(policy)
    cuda = next(policy.parameters()).is_cuda
    fast = isinstance(policy, GridsPolicy) and policy.acts_fast()
    before = () if fast else STAGES[:3]

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    def run(count: int) -> dict[str, float]:
        with ExitStack() as stack:
            stack.enter_context(_steps(policy, count))
            parts = {} if fast else stack.enter_context(_meter(policy, now))
            stack.enter_context(torch.inference_mode())
            start = now()
            policy.predict_action_chunk(dict(batch))
            return parts | {"total": now() - start}

    # Another number of steps tells what a step takes.
    other = 1 if steps > 1 else 2
    for count in (steps, other) if fast else ():
        # The first chunk of each is computed both ways.
        run(count)
    for _ in range(warmup):
        run(steps)
    if steps == 0:
        runs = [run(0) for _ in range(repeats)]
        full = {name: _quantile([ours[name] for ours in runs], 0.5) for name in (*before, "total")}
        full |= {"steps": 0.0, "prefill": full["total"] - sum(full[name] for name in before)}
        return full, _quantile([ours["total"] for ours in runs], 0.95)
    # Alternate, so that a slower phase of the machine affects both in the same way.
    rounds = [(run(steps), run(other)) for _ in range(repeats)]
    full = {name: _quantile([ours[name] for ours, _ in rounds], 0.5) for name in (*before, "total")}
    per_step = _quantile([(ours["total"] - theirs["total"]) / (steps - other) for ours, theirs in rounds], 0.5)
    full["steps"] = per_step * steps
    full["prefill"] = full["total"] - sum(full[name] for name in (*before, "steps"))
    return full, _quantile([ours["total"] for ours, _ in rounds], 0.95)


def _quantile(values: list[float], quantile: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(quantile))


def peak_memory_mib(policy: Any) -> float:
    """Peak memory in MiB: of the GPU since its counter was reset, or of this process so far."""
    if next(policy.parameters()).is_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
