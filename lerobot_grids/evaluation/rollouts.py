"""Closed-loop success of a policy in simulation, measured with LeRobot's own evaluation code."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.configs import FeatureType
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env_pre_post_processors
from lerobot.envs.utils import env_to_policy_features
from lerobot.scripts.lerobot_eval import eval_policy
from lerobot.utils.constants import ACTION

from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import SimulationError

from ..policies import LoadedPolicy, flow_steps, token_counts
from .success import Evaluation, summarise
from .tampering import other_instructions, tamper


def check_fit(config: Any, renames: dict[str, str], env_config: EnvConfig) -> None:
    """Raise `SimulationError` unless an environment has the cameras and the action shape of a policy's configuration.

    Args:
        config: The policy's configuration.
        renames: Names of the environment's observations to the policy's.
        env_config: The environment's.
    """
    features = env_to_policy_features(env_config)
    shown = [renames.get(key, key) for key, feature in features.items() if feature.type is FeatureType.VISUAL]
    if not set(shown) & set(config.image_features):
        wanted = next(iter(config.image_features))
        raise SimulationError(
            f"the policy looks through {', '.join(config.image_features)}; the environment shows {', '.join(shown)}. "
            f'Rename with --rename_map \'{{"{shown[0] if shown else "..."}": "{wanted}"}}\''
        )
    acts, takes = (tuple(shape[ACTION].shape) for shape in (config.output_features, features))
    if acts != takes:
        raise SimulationError(
            f"the policy's actions have shape {acts}, the environment takes {takes}; "
            "evaluate it in the environment of its dataset"
        )


def evaluate(
    loaded: LoadedPolicy,
    env_config: EnvConfig,
    *,
    episodes: int,
    seed: int = 100_000,
    batch_size: int = 10,
    source: str = "",
    tampering: list[str] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Run episodes of every task of an environment and count successes.

    Args:
        loaded: The policy and its processors.
        env_config: LeRobot's configuration of the environment.
        episodes: Number of episodes of each task.
        seed: Seed of the first episode; the others have the next seeds. Recordings should use other seeds.
        batch_size: Number of episodes that run in parallel.
        source: Name of the policy to write into the result.
        tampering: Changes to the policy's input, from `choices.TAMPERINGS`.
        on_start: Called once with the number of episodes over all tasks.
        on_progress: Called with (task, episodes done, successes) after each batch.

    Raises:
        SimulationError: If the environment does not fit the policy, or a tampering cannot be applied.
    """
    check_fit(loaded.policy.config, loaded.renames, env_config)
    used, dense = token_counts(loaded.policy)
    result = Evaluation(
        source,
        loaded.policy.config.type,
        used,
        dense,
        environment=env_config.type,
        n_action_steps=getattr(loaded.policy.config, "n_action_steps", None),
        num_steps=flow_steps(loaded.policy),
        perturb=getattr(env_config, "perturb", ""),
        layout=getattr(env_config, "layout", ""),
        tamper=tampering or [],
        reducer=loaded.reducer,
        resolution=loaded.resolution,
    )
    with open_tasks(env_config, min(batch_size, episodes), result.tamper) as tasks:
        if on_start is not None:
            on_start(episodes * len(tasks))
        for task in tasks:
            start = time.perf_counter()
            outcomes: list[bool] = []
            seeds: list[int] = []
            torch.manual_seed(seed)
            with acting(loaded, env_config, task, result.tamper, seed) as arguments:
                while len(outcomes) < episodes:
                    count = min(task.env.num_envs, episodes - len(outcomes))
                    task.begin_at(len(outcomes))
                    with without_bars():
                        info = eval_policy(task.env, **arguments, n_episodes=count, start_seed=seed + len(outcomes))
                    outcomes += [bool(episode["success"]) for episode in info["per_episode"]]
                    seeds += [int(episode["seed"]) for episode in info["per_episode"]]
                    if on_progress is not None:
                        on_progress(task.name, len(outcomes), sum(outcomes))
            task.close()
            result.tasks.append(summarise(task.name, outcomes, seeds, time.perf_counter() - start, task.suite))
    return result


@dataclass
class Task:
    """A task of a suite, its vector environment, and the instruction for tampering 'instruction'."""

    suite: str
    name: str
    env: Any
    other_instruction: str = ""

    def begin_at(self, episode: int) -> None:
        """Make the next reset start with this episode.

        LIBERO chooses the initial state by counting resets, and a success causes one more reset. Without this call the
        initial states would depend on the policy's successes.
        """
        if all(hasattr(env.unwrapped, "init_state_id") for env in getattr(self.env, "envs", [self.env])):
            self.env.set_attr("init_state_id", [episode + i for i in range(self.env.num_envs)])

    def close(self) -> None:
        """Close the environment and drop the reference to it."""
        if self.env is not None:
            self.env.close()
        self.env = None


@contextmanager
def open_tasks(config: EnvConfig, batch_size: int, tampering: list[str]) -> Iterator[list[Task]]:
    """Create all tasks of an environment; at the end of the block, open environments are closed."""
    # LeRobot prints a line per task; hide it.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        suites = config.create_envs(n_envs=batch_size)
    numbered = hasattr(config, "task_ids")  # LIBERO's suites, of which one task may be chosen
    tasks = [
        Task(suite, suite if list(envs) == [0] and not numbered else f"{suite}_{task_id}", env)
        for suite, envs in suites.items()
        for task_id, env in envs.items()
    ]
    # Only tasks may refer to environments, so that closing frees their memory: LIBERO-Plus has ten thousand.
    del suites
    try:
        if "instruction" in tampering:
            others = other_instructions([task.env.call("task_description")[0] for task in tasks])
            for task, other in zip(tasks, others, strict=True):
                task.other_instruction = other
        yield tasks
    finally:
        for task in tasks:
            task.close()


@contextmanager
def acting(
    loaded: LoadedPolicy, env_config: EnvConfig, task: Task, tampering: list[str], seed: int
) -> Iterator[dict[str, Any]]:
    """Arguments for LeRobot's rollout except the environment; the tampering is active in this block."""
    # LeRobot prepares observations by the class of the configuration, so it gets the base policy's.
    before, after = make_env_pre_post_processors(env_cfg=env_config, policy_cfg=base_config(loaded.policy.config))
    with tamper(tampering, loaded.policy, loaded.preprocessor, task.other_instruction, seed) as spoil:
        yield {
            "policy": loaded.policy,
            "env_preprocessor": (lambda observation: spoil(before(observation))) if tampering else before,
            "env_postprocessor": after,
            "preprocessor": loaded.preprocessor,
            "postprocessor": loaded.postprocessor,
        }


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the progress bars that LeRobot draws on standard error, because they overwrite ours."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield
