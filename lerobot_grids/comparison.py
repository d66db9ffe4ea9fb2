"""Several policies, or several ways of having fewer visual tokens, on the same episodes."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import OBS_STATE

from lerobot_policy_grids.errors import GridsError

from .evaluation import Evaluation, LoadedPolicy, evaluate, load_policy
from .profiling.compare import device_name
from .profiling.measure import count_flops, measure_latency
from .simulation.environments import task_names
from .statistics import Paired, paired_comparison, wilson_interval


@dataclass
class Method:
    """One way of acting, trained once or with several seeds.

    Attributes:
        policies: Checkpoints, one per training seed.
        tokens: Run-time budget of a grids checkpoint, or of `reducer`.
        reducer: Reduces the tokens of a dense checkpoint without training.
        resolution: Side in pixels at which a dense checkpoint sees its images, without training.
    """

    policies: list[str]
    tokens: int | None = None
    reducer: str | None = None
    resolution: int | None = None


@dataclass
class MethodResult:
    """What came of one method.

    Attributes:
        name: Its name.
        num_tokens: Visual tokens per camera.
        by_task: {task: (successes, episodes)} over all training seeds.
        by_seed: Success rate of each training seed over all tasks.
        successes: Over all tasks and training seeds.
        episodes: Over all tasks and training seeds.
        interval: 95 % Wilson interval of the success rate.
        paired: Against the first method, on the same episodes; None for the first.
        gflops: Of one action chunk, counted; None where it was not.
        latency_ms: Median of one action chunk at batch 1; None where it was not measured.
    """

    name: str
    num_tokens: int | None
    by_task: dict[str, tuple[int, int]]
    by_seed: list[float]
    successes: int
    episodes: int
    interval: tuple[float, float]
    paired: Paired | None
    gflops: float | None = None
    latency_ms: float | None = None

    @property
    def rate(self) -> float:
        """Success rate over everything."""
        return self.successes / self.episodes


@dataclass
class ComparisonResult:
    """Results of all methods, the first being what the others are compared with."""

    protocol: dict[str, Any]
    device: str
    threads: int
    torch: str = torch.__version__
    methods: list[MethodResult] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def compare(
    methods: dict[str, Method],
    make_env: Callable[[int], EnvConfig],
    folder: Path,
    *,
    episodes: int,
    seed: int = 100_000,
    batch_size: int = 10,
    device: str | None = None,
    costs: bool = True,
    protocol: dict[str, Any] | None = None,
    on_episodes: Callable[[str, int], None] | None = None,
) -> ComparisonResult:
    """Evaluate every policy of every method on the same episodes, and set them side by side.

    What a policy did is kept in `folder` as `<method>-<number>.json`, and read from there when the same is asked again,
    so a comparison that was stopped goes on, and one more method costs only itself.

    Args:
        methods: By name; the first is what the others are compared with.
        make_env: Gives the environment's configuration for a policy that looks every so many steps.
        folder: For the evaluations.
        episodes: Episodes of each task.
        seed: Seed of the first episode.
        batch_size: Episodes that run side by side.
        device: Where policies run; None keeps each checkpoint's own.
        costs: Whether to count FLOPs and measure milliseconds, too.
        protocol: What else an evaluation that is read back must have in common with this one.
        on_episodes: Called with (what is running, episodes more that are done).

    Raises:
        GridsError: If a policy cannot be loaded, or a kept evaluation is of something else.
    """
    protocol = {"episodes": episodes, "seed": seed} | (protocol or {})
    result = ComparisonResult(protocol, device_name(device or "cpu"), torch.get_num_threads())
    reference: list[Evaluation] = []
    for name, method in methods.items():
        evaluations = []
        for number, policy in enumerate(method.policies):
            asked = protocol | asdict(method) | {"policies": policy}
            path = folder / f"{name}-{number}.json"
            evaluation = _kept(path, asked)
            if evaluation is None:
                loaded = _load(method, policy, device)
                env_config = make_env(getattr(loaded.policy.config, "n_action_steps", 1))
                done: dict[str, int] = {}

                def show(task: str, count: int, successes: int, done: dict[str, int] = done, name: str = name) -> None:
                    if on_episodes is not None:
                        on_episodes(f"{name} {task}", count - done.get(task, 0))
                    done[task] = count

                evaluation = evaluate(
                    loaded,
                    env_config,
                    episodes=episodes,
                    seed=seed,
                    batch_size=batch_size,
                    source=policy,
                    on_progress=show,
                )
                evaluation.save(path, asked=asked)
            elif on_episodes is not None:
                on_episodes(name, sum(task.episodes for task in evaluation.tasks))
            evaluations.append(evaluation)
        reference = reference or evaluations
        result.methods.append(_summarise(name, evaluations, None if evaluations is reference else reference))
    if costs:
        for method, row in zip(methods.values(), result.methods, strict=True):
            loaded = _load(method, method.policies[0], device)
            row.gflops, row.latency_ms = _costs(loaded, make_env(1))
    return result


def _load(method: Method, policy: str, device: str | None) -> LoadedPolicy:
    return load_policy(policy, device, method.tokens, reducer=method.reducer, resolution=method.resolution)


def _kept(path: Path, asked: dict[str, Any]) -> Evaluation | None:
    """An evaluation of just this that is there already."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        evaluation, was = Evaluation.from_dict(found), found["asked"]
    except (ValueError, KeyError, TypeError) as error:
        raise GridsError(f"{path} cannot be read ({error!r}); remove it to evaluate again") from error
    if was != asked:
        different = [name for name in asked if was.get(name) != asked[name]]
        raise GridsError(
            f"{path} was evaluated with another {', '.join(different)} "
            f"({was.get(different[0]) if different else was}, now {asked[different[0]] if different else asked}); "
            "remove it, or choose another --output"
        )
    return evaluation


def _summarise(name: str, evaluations: list[Evaluation], reference: list[Evaluation] | None) -> MethodResult:
    by_task: dict[str, tuple[int, int]] = {}
    for evaluation in evaluations:
        for task in evaluation.tasks:
            successes, episodes = by_task.get(task.task, (0, 0))
            by_task[task.task] = successes + task.successes, episodes + task.episodes
    totals = [evaluation.total for evaluation in evaluations]
    successes, episodes = sum(total.successes for total in totals), sum(total.episodes for total in totals)
    paired = None
    if reference is not None:
        # Seed by seed; a reference of fewer seeds is met again.
        ours = [outcome for total in totals for outcome in total.outcomes]
        met = [reference[number % len(reference)].total for number in range(len(totals))]
        if any(mine.seeds != other.seeds for mine, other in zip(totals, met, strict=True)):
            raise GridsError(f"'{name}' was not evaluated on the first method's episodes; remove its results")
        paired = paired_comparison(ours, [outcome for total in met for outcome in total.outcomes])
    return MethodResult(
        name,
        evaluations[0].num_tokens,
        by_task,
        [total.success_rate for total in totals],
        successes,
        episodes,
        wilson_interval(successes, episodes),
        paired,
    )


def _costs(loaded: LoadedPolicy, env_config: EnvConfig) -> tuple[float, float]:
    """(GFLOPs, median milliseconds) of one action chunk on one observation, as the pre-processor gives it."""
    config = loaded.policy.config
    observation: dict[str, Any] = {key: torch.rand(1, *feature.shape) for key, feature in config.image_features.items()}
    if config.robot_state_feature is not None:
        observation[OBS_STATE] = torch.zeros(1, *config.robot_state_feature.shape)
    batch = loaded.preprocessor(observation | {"task": [task_names(env_config)[0]]})
    flops = count_flops(loaded.policy, batch)
    latency, _ = measure_latency(loaded.policy, batch, warmup=3, repeats=15)
    return sum(flops.values()) / 1e9, latency["total"]
