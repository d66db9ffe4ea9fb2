"""Compare the costs of a policy with all tokens and with K tokens, on the same observation and device."""

import platform
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lerobot_policy_grids import GridsPolicy, compress
from lerobot_policy_grids.errors import UnsupportedPolicyError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.modeling_grids import dense_policy
from lerobot_policy_grids.reducers import reducer_config

from ..policies import flow_steps, load, set_flow_steps
from .architectures import architectures, instantiate, make_batch, make_config, precision
from .known_values import KnownValues
from .measure import Cost, count_flops, measure_latency, peak_memory_mib, prefix_length


@dataclass
class BenchResult:
    """Costs of one policy in several variants, and the machine on which they were measured."""

    policy: str
    cameras: int
    language_tokens: int
    parameters: int
    dtype: str
    device: str | None
    threads: int
    torch: str = torch.__version__
    costs: list[Cost] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return vars(self) | {"costs": [cost.to_dict() for cost in self.costs]}


def device_name(device: str) -> str:
    """Name of the device for people, such as the model of the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or device


def bench(
    policy: str,
    tokens: list[int],
    *,
    reducers: list[str] | None = None,
    layers: list[int] | None = None,
    steps: list[int] | None = None,
    cameras: int = 2,
    language_tokens: int | None = None,
    resolutions: list[int] | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
    runtime: tuple[str, str, str] | None = None,
    warmup: int = 2,
    repeats: int = 5,
    on_progress: Callable[[str], None] | None = None,
) -> BenchResult:
    """Measure a policy with all tokens, at each token budget, and with all tokens at lower resolutions.

    Args:
        policy: Name of an architecture, for random weights, or a checkpoint.
        tokens: Budgets, in visual tokens per camera.
        reducers: Names of reducers; None takes "grids".
        layers: After which layers of the vision tower tokens are sampled inside it, besides after the whole tower.
        steps: Integration steps of the flow; each variant is measured with each. None takes the policy's own.
        cameras: Number of cameras for an architecture; a checkpoint has a fixed number.
        language_tokens: Number of instruction tokens after padding; None takes the family's default.
        resolutions: Sides in pixels of smaller images for the dense policy.
        dtype: Precision, for families that support both.
        device: Device on which to measure time and memory; None only counts FLOPs.
        runtime: With a device, (runtime, quantisation, precision) of `GridsPolicy.use_runtime`, in which each budget is
            measured, too.
        warmup: Number of runs before timing.
        repeats: Number of timed runs.
        on_progress: Called with the name of what is being measured.

    Raises:
        BudgetError: If a budget exceeds the dense tokens.
        UnsupportedPolicyError: If the policy is unknown, an image size does not give a whole token grid, or the policy
            cannot act in that runtime.
    """
    architecture = architectures().get(policy)
    length = language_tokens or (48 if architecture is None else architecture.language_tokens)

    def make(place: str | None, size: int | None = None) -> Any:
        if architecture is not None:
            return instantiate(make_config(policy, cameras, size, dtype), place or "cpu")
        loaded = load(policy, device=place).policy
        return loaded.detach() if isinstance(loaded, GridsPolicy) else loaded

    def make_pair(size: int | None = None) -> tuple[Any, Any]:
        """Make the policy to count and the policy to time, or None; they are one object unless meta is enough."""
        if architecture is not None and architecture.counted_on_meta:
            return make("meta", size), make(device, size) if device else None
        both = make(device, size)
        return both, both if device else None

    counted, timed = make_pair()
    result = BenchResult(
        policy,
        cameras=len(counted.config.image_features),
        language_tokens=length,
        parameters=sum(parameter.numel() for parameter in counted.parameters()),
        dtype=precision(counted),
        device=None if device is None else device_name(device),
        threads=torch.get_num_threads(),
    )

    def add(name: str, counted: Any, timed: Any) -> None:
        if not steps:
            measure(name, counted, timed)
        for count in steps or []:
            for one in filter(None, (counted, timed)):
                set_flow_steps(one, count)
            measure(f"{name}, {count} {'step' if count == 1 else 'steps'}", counted, timed)

    def measure(name: str, counted: Any, timed: Any) -> None:
        if on_progress is not None:
            on_progress(name)
        base = dense_policy(counted)
        on_meta = next(counted.parameters()).is_meta
        batch = make_batch(base, length, str(next(counted.parameters()).device))
        dense_tokens = get_family(base.config.type).layout(base).num_dense_tokens
        used = counted.num_tokens if isinstance(counted, GridsPolicy) else dense_tokens
        with KnownValues() if on_meta else nullcontext():
            cost = Cost(name, used, prefix_length(counted, batch), count_flops(counted, batch), flow_steps(counted))
        result.costs.append(cost)
        if timed is None:
            return
        batch = make_batch(dense_policy(timed), length, str(next(timed.parameters()).device))
        time(cost, timed, batch)
        if runtime is not None and isinstance(timed, GridsPolicy):
            # It computes the same FLOPs, and twice for the first observation of each shape.
            words = [word for word in runtime if word not in ("none", "own")]
            result.costs.append(replace(cost, name=" ".join([name, *words])))
            timed.use_runtime(*runtime)
            time(result.costs[-1], timed, batch)
            result.costs[-1].apart = _apart(timed)
            timed.use_runtime("eager")

    def time(cost: Cost, timed: Any, batch: dict[str, Any]) -> None:
        if next(timed.parameters()).is_cuda:
            torch.cuda.reset_peak_memory_stats()
        cost.latency_ms, cost.latency_p95_ms = measure_latency(timed, batch, warmup, repeats)
        cost.peak_memory_mib = peak_memory_mib(timed)

    ways = {
        _label(name, budget, layer): reducer_config(
            name, num_tokens=budget, **({} if layer is None else {"sample_after_layer": layer})
        )
        for name in reducers or ["grids"]
        for layer in (None, *(layers or []))
        for budget in tokens
    }
    # Check all budgets before the first measurement, which takes minutes.
    for way in ways.values():
        compress(counted, reducer=way).detach()
    add("dense", counted, timed)
    for label, way in ways.items():
        # `counted` and `timed` may be one object, two objects, or `timed` may be None.
        wrapped = [
            compress(dense, reducer=way, runtime="eager") if dense is not None else None
            for dense in dict.fromkeys((counted, timed))
        ]
        add(label, wrapped[0], wrapped[-1] if timed is not None else None)
        for one in filter(None, wrapped):
            one.detach()
    del counted, timed
    for size in resolutions or []:
        add(f"dense at {size} px", *make_pair(size))
    return result


def _apart(policy: GridsPolicy) -> float:
    """How far the first action chunks of the fast path were from the eager ones.

    Raises:
        UnsupportedPolicyError: If the fast path does not act.
    """
    runtime = policy.seam.runtime
    shares: list[float] = []
    for found in () if runtime is None else runtime.differences.values():
        if isinstance(found, str):
            raise UnsupportedPolicyError(f"runtime={policy.config.runtime} does not act with this policy: {found}")
        shares.append(found)
    return max(shares)


def _label(reducer: str, tokens: int, layer: int | None) -> str:
    label = f"K={tokens}" if reducer == "grids" else f"{reducer} K={tokens}"
    return label if layer is None else f"{label} L={layer}"
