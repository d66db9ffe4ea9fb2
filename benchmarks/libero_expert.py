"""How often the scripted expert succeeds, and how often the same expert does that does not look.

    python benchmarks/libero_expert.py --suites libero_object      # 10 minutes on one core

The expert that does not look believes that each object is at the mean of its official places. Where it succeeds,
success does not show that a policy looks. One line of JSON for each task, layout and expert.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import results

from lerobot_grids.evaluation.statistics import wilson_interval
from lerobot_grids.simulation.libero.environment import LiberoConfig, LiberoEnv
from lerobot_grids.simulation.libero.expert import Expert

FIRST_SEED = 100_000


def official_places(env: LiberoEnv) -> dict[str, np.ndarray]:
    """Mean position [3] of each object over the official states."""
    positions: dict[str, list[np.ndarray]] = {}
    for state in env._init_states:
        env._env.set_init_state(state)
        for name, pose in env.poses().items():
            positions.setdefault(name, []).append(pose.position)
    return {name: np.mean(places, 0) for name, places in positions.items()}


def succeeds(env: LiberoEnv, seed: int, belief: dict[str, np.ndarray] | None) -> bool:
    """Whether the expert solves an episode."""
    env.init_state_id = seed
    env.reset(seed=seed)
    expert = Expert(env.simulation, seed=seed, belief=belief)
    for _ in range(env._max_episode_steps):
        *_, info = env.step(np.clip(expert.act(), -1, 1))
        if info["is_success"]:
            return True
    return False


def measure(suite: str, number: int, layout: str, episodes: int) -> list[dict[str, Any]]:
    """Lines of the results of one task: the expert, and the one that does not look."""
    # Nobody sees the images, so none is drawn.
    config = LiberoConfig(task=f"{suite}_{number}", layout=layout, drawing="fast", render_interval=10_000)
    env = config.make(suite, number)
    env.reset(seed=0)
    lines = []
    for name, belief in (("looks", None), ("blind", official_places(env))):
        start = time.process_time()
        outcomes = "".join("01"[succeeds(env, FIRST_SEED + i, belief)] for i in range(episodes))
        lines.append(
            {"kind": "libero-expert", "suite": suite, "task": number, "layout": layout, "expert": name}
            | {"first_seed": FIRST_SEED, "outcomes": outcomes, "cpu_seconds": round(time.process_time() - start, 1)}
        )
        print(f"{suite} {number} {layout} {name}: {outcomes.count('1')}/{episodes}", flush=True)
    env.close()
    return lines


def main() -> None:
    """Measure and print sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=["libero_object", "libero_spatial"])
    parser.add_argument("--layouts", nargs="+", default=["official", "dealt"])
    parser.add_argument("--tasks", nargs="+", type=int, default=range(10), help="numbers of the suites' tasks")
    parser.add_argument("--episodes", type=int, default=3, help="of each task")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "libero-expert.jsonl")
    asked = parser.parse_args()
    for suite in asked.suites:
        for layout in asked.layouts:
            sums = {"looks": "", "blind": ""}
            for number in asked.tasks:
                lines = measure(suite, number, layout, asked.episodes)
                results.put(asked.results, lines)
                for line in lines:
                    sums[line["expert"]] += line["outcomes"]
            for name, outcomes in sums.items():
                low, high = wilson_interval(outcomes.count("1"), len(outcomes))
                print(f"{suite} {layout} {name}: {outcomes.count('1')}/{len(outcomes)} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
