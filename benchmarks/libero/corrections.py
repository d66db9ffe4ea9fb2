r"""Record demonstrations that begin where a policy went: it acts for a while, then the scripted expert takes over.

    python benchmarks/libero/corrections.py outputs/libero/dense outputs/libero/corrections --episodes 20

Only what the expert does is recorded. So the demonstrations show what to do in states that the policy brings about, as
in DAgger (Ross et al. 2011), and each of them is a success.
"""

import argparse
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lerobot_grids.console import counting_bar
from lerobot_grids.policies import LoadedPolicy, load
from lerobot_grids.simulation.libero.demonstrator import LiberoDemonstrator, as_policies_see
from lerobot_grids.simulation.libero.environment import LiberoEnv
from lerobot_grids.simulation.recording import record

# The policy acts for up to so many steps, and executes so many actions of a chunk. Later it may hold the object.
LONGEST, EXECUTED = 70, 4
# No seed of a recording or an evaluation.
FIRST_SEED = 800_000


@lru_cache(1)
def loaded_once(folder: str) -> LoadedPolicy:
    """A policy, loaded once in each process."""
    torch.set_num_threads(1)
    loaded = load(folder)
    loaded.policy.config.n_action_steps = EXECUTED
    return loaded


@dataclass(frozen=True)
class CorrectingDemonstrator(LiberoDemonstrator):
    """An expert that takes over from a policy.

    Args:
        policy: Folder of the policy.
    """

    policy: str = ""

    @torch.no_grad()
    def lead_in(self, env: LiberoEnv, prepare: Any, observation: dict[str, Any], seed: int) -> dict[str, Any]:
        """Let the policy act for a random number of steps."""
        loaded = loaded_once(self.policy)
        loaded.policy.reset()
        torch.manual_seed(seed)
        for _ in range(np.random.default_rng(seed).integers(LONGEST)):
            seen = as_policies_see(observation, prepare)
            chosen = loaded.policy.select_action(loaded.preprocessor(seen | {"task": [env.task_description]}))
            observation, _, _, _, info = env.step(loaded.postprocessor(chosen)[0].clamp(-1, 1).numpy())
            if info["is_success"]:
                observation, _ = env.reset(seed=seed)
                break
        return observation


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", help="folder of the policy that begins")
    parser.add_argument("output", help="folder of the new dataset")
    parser.add_argument("--tasks", default="libero_object", help="suites or tasks, comma-separated")
    parser.add_argument("--episodes", type=int, default=20, help="of each task")
    parser.add_argument("--size", type=int, default=144)
    parser.add_argument("--zoom", type=float, default=1.4, help="how many times larger the overview camera draws")
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    expert = CorrectingDemonstrator(
        arguments.tasks, size=arguments.size, zoom=arguments.zoom, policy=arguments.policy, pushes=0.02
    )
    with counting_bar("recording", len(expert.tasks) * arguments.episodes, "episodes") as bar:
        recorded = record(
            arguments.output,
            expert,
            episodes=arguments.episodes,
            seed=arguments.seed,
            workers=arguments.workers,
            on_episode=lambda episode: bar.advance(),
        )
    print(f"{recorded.episodes} episodes, {recorded.frames} frames -> {arguments.output}")


if __name__ == "__main__":
    main()
