"""Let a policy act for minutes as on a robot, and fail if its memory grows or its slowest actions get slower.

    python benchmarks/soak.py --minutes 10                     the shipped tiny policy, eager
    python benchmarks/soak.py --minutes 10 --runtime fast

An episode is some seconds of `select_action` at a fixed rate, each with a new observation; then come `reset`, another
instruction and another number of visual tokens. Instructions are of several lengths, so that with a fast runtime
several shapes are in use. Every combination is prepared for before the clock starts, as `warm_up` is for.

Memory is the resident memory of this process, read at the end of each episode: the median of the last tenth of the
episodes may exceed that of the second tenth by `--max_growth_mib` at most. The first tenth is left out: Python and
torch still reserve what they keep. Milliseconds are those of every call, most of which only take an action from the
queue; the p99 of the last tenth of the calls may be `--max_drift` times that of the first tenth at most. Exit code 1
beyond a bound. On a machine with other work, `--clock cpu` counts this process's CPU time only.
"""

import argparse
import gc
import itertools
import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lerobot
import psutil
import torch
from lerobot.utils.constants import OBS_STATE

from lerobot_grids.policies import load
from lerobot_policy_grids import GridsPolicy, compress

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TASKS = (
    "push the puck to the goal",
    "pick up the red block and put it into the drawer, then close the drawer with the handle",
    "open",
)
# Of the calls, and of the episodes, that are compared.
PART = 10
MIB = 2**20


@dataclass
class Record:
    """What happened.

    Attributes:
        milliseconds: Of each call of `select_action`.
        memory_mib: Resident memory at the end of each episode.
        late: Calls that ended after the next was due.
    """

    milliseconds: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    late: int = 0


def build(policy: str, tokens: list[int], runtime: str) -> Any:
    """The policy with its processors, as a grids policy of the largest budget."""
    loaded = load(policy, device="cpu")
    if not isinstance(loaded.policy, GridsPolicy):
        loaded.policy = compress(loaded.policy, max(tokens))
    loaded.policy.use_runtime(runtime)
    return loaded


class Robot:
    """Observations of a robot that is not there.

    Args:
        loaded: The policy with its processors.
        seed: Of pixels and states.
    """

    def __init__(self, loaded: Any, seed: int) -> None:
        self.preprocessor = loaded.preprocessor
        self.generator = torch.Generator().manual_seed(seed)
        features = loaded.policy.config.input_features
        self.shapes = {name: tuple(feature.shape) for name, feature in features.items()}

    def observe(self, task: str) -> dict[str, Any]:
        """A new observation, as the policy gets it."""
        frame: dict[str, Any] = {
            name: torch.randn(shape, generator=self.generator)
            if name == OBS_STATE
            else torch.rand(shape, generator=self.generator)
            for name, shape in self.shapes.items()
        }
        batch: dict[str, Any] = self.preprocessor(frame | {"task": task})
        return batch


def act(loaded: Any, options: argparse.Namespace) -> Record:
    """Act until the time is over."""
    policy, record, now = loaded.policy, Record(), CLOCKS[options.clock]
    robot, draw, process = Robot(loaded, options.seed), random.Random(options.seed), psutil.Process()
    for task, tokens in itertools.product(TASKS, options.tokens):
        policy.num_tokens = tokens
        policy.warm_up(robot.observe(task))
    # What exists already is not looked through after each episode.
    gc.freeze()
    start = due = time.perf_counter()
    while time.perf_counter() - start < 60 * options.minutes:
        task, policy.num_tokens = draw.choice(TASKS), draw.choice(options.tokens)
        policy.reset()
        for _ in range(round(options.episode * options.rate)):
            due = max(due, time.perf_counter() - 1) + 1 / options.rate
            batch, before = robot.observe(task), now()
            with torch.inference_mode():
                loaded.postprocessor(policy.select_action(batch))
            record.milliseconds.append(1000 * (now() - before))
            waiting = due - time.perf_counter()
            record.late += waiting < 0
            time.sleep(max(0, waiting))
        gc.collect()
        record.memory_mib.append(process.memory_info().rss / MIB)
    gc.unfreeze()
    return record


def judge(record: Record, max_growth_mib: float, max_drift: float) -> dict[str, Any]:
    """What is compared, and what of it is beyond a bound.

    Raises:
        ValueError: If there are too few episodes for tenths.
    """
    episodes, calls = len(record.memory_mib) // PART, len(record.milliseconds) // PART
    if episodes < 1:
        raise ValueError(f"{len(record.memory_mib)} episodes; at least {PART} are needed, so give more --minutes")
    first, last = record.milliseconds[:calls], record.milliseconds[-calls:]
    quantiles = {
        f"{name}_{part}_ms": float(torch.tensor(values, dtype=torch.float64).quantile(quantile))
        for part, values in (("first", first), ("last", last))
        for name, quantile in (("p50", 0.5), ("p99", 0.99))
    }
    early = median(record.memory_mib[episodes : 2 * episodes])
    growth, ratio = median(record.memory_mib[-episodes:]) - early, quantiles["p99_last_ms"] / quantiles["p99_first_ms"]
    faults = []
    if growth > max_growth_mib:
        faults.append(f"memory grew by {growth:.1f} MiB, more than {max_growth_mib:g}")
    if ratio > max_drift:
        faults.append(f"p99 became {ratio:.2f} times as long, more than {max_drift:g}")
    return {
        "episodes": len(record.memory_mib),
        "calls": len(record.milliseconds),
        "late": record.late,
        "memory_mib": early,
        "growth_mib": growth,
        **quantiles,
        "p99_ratio": ratio,
        "faults": faults,
    }


def main() -> int:
    """Parse the command line, act, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="tiny_metaworld", help="checkpoint, dense or grids")
    parser.add_argument("--runtime", default="eager", choices=("eager", "fast", "compiled"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=30, help="actions per second")
    parser.add_argument("--episode", type=float, default=4, help="seconds between two resets")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 8, 16], help="budgets that are drawn")
    parser.add_argument("--max_growth_mib", type=float, default=16, help="largest growth of the memory")
    parser.add_argument("--max_drift", type=float, default=1.5, help="largest ratio of the p99")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: of this process, without other load")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="append the result to this file, as one line")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = build(options.policy, options.tokens, options.runtime)
    try:
        result = judge(act(loaded, options), options.max_growth_mib, options.max_drift)
    except ValueError as error:
        print(f"soak: error: {error}", file=sys.stderr)
        return 2
    runtime = loaded.policy.seam.runtime
    if runtime is not None:
        result["shapes"] = len(runtime.differences)
        result["faults"] += [
            f"{options.runtime} did not act: {why}" for why in runtime.differences.values() if isinstance(why, str)
        ]
    told = {name: value for name, value in vars(options).items() if name != "json"}
    versions = {"torch": torch.__version__, "lerobot": lerobot.__version__}
    line = {"kind": "soak", **told, "threads": torch.get_num_threads(), **versions, **result}
    print(json.dumps(line, indent=2))
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(line) + "\n")
    for fault in result["faults"]:
        print(f"soak: {fault}", file=sys.stderr)
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
