"""Closed-loop success of a policy in simulation, through LeRobot's own evaluation code."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env_pre_post_processors
from lerobot.envs.utils import env_to_policy_features
from lerobot.policies.factory import make_pre_post_processors
from lerobot.scripts.lerobot_eval import eval_policy, rollout
from lerobot.utils.constants import ACTION
from lerobot.utils.io_utils import write_video

from lerobot_policy_grids.adapters import get_adapter
from lerobot_policy_grids.checkpoint import CHECKPOINT_FOLDER, is_published, read_config, require_complete
from lerobot_policy_grids.errors import CheckpointError, GridsError, SimulationError, UnsupportedPolicyError
from lerobot_policy_grids.modeling_grids import GridsPolicy, build, load_checkpoint
from lerobot_policy_grids.trust import check_processors

from .policies import find_source, set_resolution, wrap
from .progress import write_json
from .statistics import wilson_interval
from .tampering import other_instructions, tamper
from .view import contact_sheet, draw_points, watch_coordinates


@dataclass
class TaskResult:
    """Success of one task, or of several: counts, the rate with its 95 % Wilson interval, every episode's outcome."""

    task: str
    successes: int
    episodes: int
    success_rate: float
    interval: tuple[float, float]
    seconds: float
    seeds: list[int]
    outcomes: list[bool]
    suite: str = ""


@dataclass
class Evaluation:
    """Success over tasks, with what was evaluated.

    Attributes:
        policy: Its name.
        policy_type: LeRobot's type of it.
        num_tokens: Visual tokens per camera.
        num_dense_tokens: Those of its dense policy.
        tasks: Success of each task.
        environment: LeRobot's type of it.
        n_action_steps: Steps of a chunk that are executed before the policy looks again.
        perturb: Perturbations as kind:severity, comma-separated; empty for none.
        tamper: What was spoiled in the policy's input.
        reducer: What reduced the tokens of a dense policy without training; empty for nothing.
        resolution: Side in pixels at which a dense policy saw its images without training; None for its own.
    """

    policy: str
    policy_type: str
    num_tokens: int | None
    num_dense_tokens: int | None
    tasks: list[TaskResult] = field(default_factory=list)
    environment: str = ""
    n_action_steps: int | None = None
    perturb: str = ""
    tamper: list[str] = field(default_factory=list)
    reducer: str = ""
    resolution: int | None = None

    @property
    def suites(self) -> list[TaskResult]:
        """Each suite's tasks together; empty where no suite has several tasks."""
        names = list(dict.fromkeys(task.suite for task in self.tasks))
        if len(names) == len(self.tasks):
            return []
        return [_together(name, [task for task in self.tasks if task.suite == name]) for name in names]

    @property
    def total(self) -> TaskResult:
        """All tasks together."""
        return _together("all", self.tasks)

    def save(self, path: Path, **more: Any) -> None:
        """Write everything, and what else is given, as JSON."""
        sums = {"suites": [asdict(suite) for suite in self.suites], "total": asdict(self.total)}
        write_json(path, asdict(self) | sums | more)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Evaluation":
        """What was saved; entries that are no fields are left out."""
        own = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        return cls(**own | {"tasks": [TaskResult(**task) for task in content["tasks"]]})


def summarise(task: str, outcomes: list[bool], seeds: list[int], seconds: float, suite: str = "") -> TaskResult:
    """Count outcomes and put an interval around their rate."""
    successes, episodes = sum(outcomes), len(outcomes)
    interval = wilson_interval(successes, episodes)
    return TaskResult(task, successes, episodes, successes / episodes, interval, seconds, seeds, outcomes, suite)


def _together(name: str, tasks: list[TaskResult]) -> TaskResult:
    outcomes = [outcome for task in tasks for outcome in task.outcomes]
    seeds = [seed for task in tasks for seed in task.seeds]
    return summarise(name, outcomes, seeds, sum(task.seconds for task in tasks))


@dataclass
class LoadedPolicy:
    """A policy ready to act, with its processors, and what was done to it without training."""

    policy: Any
    preprocessor: Any
    postprocessor: Any
    reducer: str = ""
    resolution: int | None = None

    @property
    def renames(self) -> dict[str, str]:
        """Names of observations to the policy's, where its pre-processor changes them."""
        renames: dict[str, str] = {}
        for step in self.preprocessor.steps:
            renames |= getattr(step, "rename_map", {})
        return renames


def load_policy(
    source: str,
    device: str | None = None,
    num_tokens: int | None = None,
    rename_map: dict[str, str] | None = None,
    n_action_steps: int | None = None,
    reducer: str | None = None,
    resolution: int | None = None,
) -> LoadedPolicy:
    """Load a checkpoint strictly, dense or grids, with the processors that were saved beside it.

    Args:
        source: Checkpoint folder, output folder of a run, or Hub id.
        device: Where it runs; None keeps the checkpoint's, or what this machine has.
        num_tokens: Run-time budget of a grids checkpoint, or of `reducer`.
        reducer: Reduce the tokens of a dense checkpoint so, without training.
        resolution: Side in pixels at which a dense checkpoint sees its images, without training.
        rename_map: Names of the environment's observations to the policy's; None keeps the checkpoint's.
        n_action_steps: Steps of each action chunk that are executed before the policy looks again; None keeps the
            checkpoint's.

    Raises:
        CheckpointError: If the checkpoint is incomplete or does not fit.
        GridsError: If the policy's chunks are shorter than `n_action_steps`, or it has none.
    """
    folder = find_source(source)
    if not isinstance(folder, Path):
        raise CheckpointError(
            f"'{source}' is a family with random weights; give the checkpoint folder of a trained policy"
        )
    require_complete(folder)
    config = read_config(folder)
    kind = config.type
    if device is not None:
        config.device = checked_device(device)
    if num_tokens is not None and kind != "grids" and reducer is None:
        raise CheckpointError(
            f"{source} is a dense '{kind}' policy, which has no token budget to set; drop --tokens, or say with "
            "--reducer how its tokens should be reduced without training"
        )
    if reducer is not None and kind == "grids":
        raise CheckpointError(f"{source} was trained with reducer '{config.reducer}'; drop --reducer")
    if resolution is not None:
        set_resolution(source, config, resolution)
    policy = build(config)
    # Before a forward pass fails on an image that gives no whole grid.
    if resolution is not None:
        get_adapter(kind).layout(policy)
    load_checkpoint(policy, folder)
    if reducer is not None:
        policy = wrap(policy, 16 if num_tokens is None else num_tokens, reducer)
    elif num_tokens is not None:
        policy.num_tokens = num_tokens
    if n_action_steps is not None:
        _set_action_steps(policy, n_action_steps)
    policy.to(config.device)
    policy.eval()
    return LoadedPolicy(policy, *load_processors(folder, config, rename_map), reducer or "", resolution)


def _set_action_steps(policy: Any, steps: int) -> None:
    config = policy.base.config if isinstance(policy, GridsPolicy) else policy.config
    longest = getattr(config, "chunk_size", None)
    if longest is None or not hasattr(config, "n_action_steps"):
        raise GridsError(f"a '{config.type}' policy does not act in chunks; drop --n_action_steps")
    if not 1 <= steps <= longest:
        raise GridsError(f"--n_action_steps {steps}; the policy's chunks have {longest} steps, so give 1 .. {longest}")
    config.n_action_steps = steps


def load_processors(folder: Path, config: Any, rename_map: dict[str, str] | None = None) -> tuple[Any, Any]:
    """The (pre-processor, post-processor) that were saved beside a checkpoint.

    Raises:
        CheckpointError: If they cannot be built, or came from the Hub and hold what could run code.
    """
    if is_published(folder):
        check_processors(folder)
    overrides: dict[str, dict[str, Any]] = {"device_processor": {"device": str(config.device)}}
    if rename_map is not None:
        overrides["rename_observations_processor"] = {"rename_map": rename_map}
    try:
        pre, post = make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=overrides)
    except Exception as error:  # LeRobot raises whatever its steps meet
        raise CheckpointError(
            f"the processors in {folder} cannot be built: {error}; copy the checkpoint again"
        ) from error
    return pre, post


def checked_device(device: str) -> str:
    """The device, if it exists here.

    Raises:
        GridsError: If torch knows no such device, or does not see it.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GridsError(f"device '{device}' is not available here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def short_name(policy: str, *settings: str | int | None) -> str:
    """What to call the results of a checkpoint that is run with some settings."""
    path = Path(policy)
    name = path.parent.name if path.name == CHECKPOINT_FOLDER else path.name
    return "-".join([name, *(str(setting) for setting in settings if setting is not None)])


def token_counts(policy: Any) -> tuple[int | None, int | None]:
    """Visual tokens per camera of a policy: (those it uses, those of its dense policy); None where unknown."""
    try:
        if isinstance(policy, GridsPolicy):
            return policy.num_tokens, policy.adapter.layout(policy.base).num_dense_tokens
        dense = get_adapter(policy.config.type).layout(policy).num_dense_tokens
        return dense, dense
    except UnsupportedPolicyError:  # a policy without a token grid can still be evaluated
        return None, None


def check_fit(loaded: LoadedPolicy, env_config: EnvConfig) -> None:
    """Raise `SimulationError` unless the environment shows what the policy looks at and takes what it does."""
    renames = loaded.renames
    features = env_to_policy_features(env_config)
    config = loaded.policy.config
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
    """Run episodes of every task of an environment.

    Args:
        loaded: Policy and processors.
        env_config: LeRobot's configuration of the environment.
        episodes: Episodes of each task.
        seed: Seed of the first episode; the next ones follow. Recordings should not contain them.
        batch_size: Episodes that run side by side.
        source: Name of the policy in the result.
        tampering: What is spoiled in the policy's input, of `tampering.TAMPERINGS`.
        on_start: Called with the number of episodes of all tasks.
        on_progress: Called with (task, episodes done, successes) after each batch.

    Raises:
        SimulationError: If the environment's cameras or actions are not the policy's, or an input cannot be spoiled.
    """
    check_fit(loaded, env_config)
    used, dense = token_counts(loaded.policy)
    result = Evaluation(
        source,
        loaded.policy.config.type,
        used,
        dense,
        environment=env_config.type,
        n_action_steps=getattr(loaded.policy.config, "n_action_steps", None),
        perturb=getattr(env_config, "perturb", ""),
        tamper=tampering or [],
        reducer=loaded.reducer,
        resolution=loaded.resolution,
    )
    with _opened(env_config, min(batch_size, episodes), result.tamper) as tasks:
        if on_start is not None:
            on_start(episodes * len(tasks))
        for task in tasks:
            start = time.perf_counter()
            outcomes: list[bool] = []
            seeds: list[int] = []
            torch.manual_seed(seed)
            with _acting(loaded, env_config, task, result.tamper, seed) as arguments:
                while len(outcomes) < episodes:
                    count = min(task.env.num_envs, episodes - len(outcomes))
                    task.begin_at(len(outcomes))
                    with _without_bars():
                        info = eval_policy(task.env, **arguments, n_episodes=count, start_seed=seed + len(outcomes))
                    outcomes += [bool(episode["success"]) for episode in info["per_episode"]]
                    seeds += [int(episode["seed"]) for episode in info["per_episode"]]
                    if on_progress is not None:
                        on_progress(task.name, len(outcomes), sum(outcomes))
            task.close()
            result.tasks.append(summarise(task.name, outcomes, seeds, time.perf_counter() - start, task.suite))
    return result


@contextmanager
def _without_bars() -> Iterator[None]:
    """LeRobot draws a bar per rollout on standard error, which buries ours."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield


def film(
    loaded: LoadedPolicy,
    env_config: EnvConfig,
    folder: Path,
    *,
    episodes: int,
    seed: int = 100_000,
    frames: int = 6,
    tampering: list[str] | None = None,
) -> list[Path]:
    """Film a few episodes of every task with the sampled points drawn on the frames.

    Args:
        loaded: Policy and processors.
        env_config: LeRobot's configuration of the environment; its images should be rendered at every step.
        folder: Where `<task>_<seed>.mp4` and `looks.png`, a sheet of `frames` frames per episode, are written.
        episodes: Episodes of each task.
        seed: Seed of the first episode.
        frames: Frames of each episode on the sheet.
        tampering: As in `evaluate`. Films show the camera's image, not what was made of it.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    rows: list[list[np.ndarray]] = []
    with _opened(env_config, 1, tampering or []) as tasks:
        for task in tasks:
            with _acting(loaded, env_config, task, tampering or [], seed) as arguments:
                for episode in range(episodes):
                    task.begin_at(episode)
                    images = _film_episode(loaded.policy, task, arguments, seed + episode)
                    path = folder / f"{task.name}_{seed + episode}.mp4"
                    write_video(str(path), np.stack(images), task.env.metadata.get("render_fps", 30))
                    written.append(path)
                    # The first frame is drawn before the policy has looked at it.
                    picked = np.linspace(min(1, len(images) - 1), len(images) - 1, frames).round().astype(int)
                    rows.append([images[i] for i in picked])
            task.close()
    sheet = folder / "looks.png"
    contact_sheet(rows, sheet)
    return [*written, sheet]


def _film_episode(policy: Any, task: "_Task", arguments: dict[str, Any], seed: int) -> list[np.ndarray]:
    """Run one episode and return its frames with the policy's points, uint8 [h, w, 3] each."""
    torch.manual_seed(seed)
    images: list[np.ndarray] = []
    with watch_coordinates(policy) as looks:

        def draw(env: Any) -> None:
            frame = np.ascontiguousarray(env.envs[0].render())
            # Elsewhere what is rendered for people is not what the policy sees.
            seen = looks and getattr(env.envs[0].unwrapped, "renders_observation", False)
            points = looks[-1][0].numpy() if seen else np.zeros((0, 2))
            region = _image_region(policy, *frame.shape[:2])
            images.append(draw_points(frame, points, region, f"{task.name}  {len(images)}"))

        with _without_bars():
            rollout(task.env, **arguments, seeds=[seed], render_callback=draw)
    if len(images) <= task.env.call("_max_episode_steps")[0]:
        images.pop()  # success resets the simulator, so the last frame shows another episode
    return images


def _image_region(policy: Any, height: int, width: int) -> tuple[float, float, float, float]:
    if isinstance(policy, GridsPolicy):
        return policy.adapter.image_region(policy.base, height, width)
    return 0.0, 0.0, 1.0, 1.0


@dataclass
class _Task:
    """A task of a suite, with its vector environment and the instruction that a tampering gives it."""

    suite: str
    name: str
    env: Any
    other_instruction: str = ""

    def begin_at(self, episode: int) -> None:
        """Let the next reset start with this episode.

        LIBERO counts resets to choose among its initial states, and a success resets once more: without this, which
        states a policy meets would depend on its successes.
        """
        if all(hasattr(env.unwrapped, "init_state_id") for env in getattr(self.env, "envs", [self.env])):
            self.env.set_attr("init_state_id", [episode + i for i in range(self.env.num_envs)])

    def close(self) -> None:
        """Close the environment and let go of it."""
        if self.env is not None:
            self.env.close()
        self.env = None


@contextmanager
def _opened(config: EnvConfig, batch_size: int, tampering: list[str]) -> Iterator[list[_Task]]:
    """All tasks of an environment; what is still open is closed afterwards."""
    # LeRobot prints a line per task.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        suites = config.create_envs(n_envs=batch_size)
    tasks = [
        _Task(suite, suite if list(envs) == [0] else f"{suite}_{task_id}", env)
        for suite, envs in suites.items()
        for task_id, env in envs.items()
    ]
    # Only the tasks hold environments, so that each is gone when it is done: LIBERO-Plus has ten thousand.
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
def _acting(
    loaded: LoadedPolicy, env_config: EnvConfig, task: _Task, tampering: list[str], seed: int
) -> Iterator[dict[str, Any]]:
    """What LeRobot's rollout takes besides the environment. In this block the policy's input is spoiled."""
    before, after = make_env_pre_post_processors(env_cfg=env_config, policy_cfg=loaded.policy.config)
    with tamper(tampering, loaded.policy, loaded.preprocessor, task.other_instruction, seed) as spoil:
        yield {
            "policy": loaded.policy,
            "env_preprocessor": (lambda observation: spoil(before(observation))) if tampering else before,
            "env_postprocessor": after,
            "preprocessor": loaded.preprocessor,
            "postprocessor": loaded.postprocessor,
        }
