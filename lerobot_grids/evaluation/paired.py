"""Compare several policies, or several methods of token reduction, on the same episodes."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import OBS_STATE

from lerobot_policy_grids.checkpoint.digests import digest_of
from lerobot_policy_grids.checkpoint.find import require_complete
from lerobot_policy_grids.errors import GridsError

from ..console import write_json
from ..policies import LoadedPolicy, find_weights, load
from ..profiling.bench import device_name
from ..profiling.measure import count_flops, measure_latency
from ..simulation.environments import task_names
from .rollouts import evaluate
from .statistics import Paired, paired_comparison, wilson_interval
from .success import Evaluation


@dataclass
class Method:
    """One method in a comparison, trained once or with several seeds.

    Attributes:
        policies: Checkpoints, one per training seed.
        tokens: Run-time budget of a grids checkpoint, or of `reducer`.
        reducer: Name of a reducer for a dense checkpoint, applied without training.
        resolution: Side in pixels of the images for a dense checkpoint, applied without training.
        num_steps: Integration steps of the flow for one action chunk. Defaults to the checkpoint's.
    """

    policies: list[str]
    tokens: int | None = None
    reducer: str | None = None
    resolution: int | None = None
    num_steps: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.policies, str) or not self.policies:
            raise GridsError(f"policies: {self.policies!r}; give a list of checkpoints, such as [outputs/base]")


@dataclass
class MethodResult:
    """Results of one method.

    Attributes:
        name: Name of the method.
        num_tokens: Visual tokens per camera.
        by_task: {task: (successes, episodes)} over all training seeds.
        by_seed: Success rate of each training seed over all tasks.
        successes: Number of successes over all tasks and training seeds.
        episodes: Number of episodes over all tasks and training seeds.
        interval: 95 % Wilson interval of the success rate. Training seeds repeat the same episodes, so they do not
            make it narrower.
        paired: Comparison with the first method on the same episodes; None for the first.
        gflops: GFLOPs of one action chunk; None if not counted.
        latency_ms: Median milliseconds of one action chunk at batch 1, as the policy acts: on a GPU a grids policy does
            so by its fast path; None if not measured.
        device: Name of the device on which the latency was measured.
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
    device: str | None = None

    @property
    def rate(self) -> float:
        """Success rate over all tasks and training seeds."""
        return self.successes / self.episodes


@dataclass
class ComparisonResult:
    """Results of all methods; the others are compared with the first."""

    protocol: dict[str, Any]
    threads: int
    torch: str = torch.__version__
    methods: list[MethodResult] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write all results as JSON."""
        write_json(path, asdict(self))


@dataclass(frozen=True)
class _Run:
    """One policy of one method, the options of its evaluation, and the path of the saved result."""

    name: str
    method: Method
    policy: str
    protocol: dict[str, Any]
    path: Path
    weights: str

    @property
    def asked(self) -> dict[str, Any]:
        """The options of this evaluation, as saved with it; options that are None are left out."""
        asked = self.protocol | asdict(self.method) | {"policies": self.policy, "weights": self.weights}
        return {name: value for name, value in asked.items() if value is not None}


def compare(
    methods: dict[str, Method],
    make_env: Callable[..., EnvConfig],
    folder: Path,
    *,
    episodes: int,
    seed: int = 100_000,
    batch_size: int = 10,
    device: str | None = None,
    tampering: list[str] | None = None,
    workers: int = 1,
    costs: bool = True,
    protocol: dict[str, Any] | None = None,
    on_evaluation: Callable[[str, int], None] | None = None,
) -> ComparisonResult:
    """Evaluate every policy of every method on the same episodes and compare the methods.

    Each evaluation is saved in `folder` as `<method>-<number>.json` and read from there in later calls with the same
    options. So a stopped comparison continues, and for an additional method only that method is evaluated.

    Args:
        methods: Methods by name; the others are compared with the first.
        make_env: Makes the environment's configuration; `look_every=` is the number of steps between two
            observations. It must be picklable.
        folder: Folder for the evaluations.
        episodes: Number of episodes of each task.
        seed: Seed of the first episode.
        batch_size: Number of episodes that run in parallel.
        device: Device of the policies; None keeps the device of each checkpoint.
        tampering: Changes to the policies' input, from `choices.TAMPERINGS`.
        workers: Number of policies that are evaluated at the same time, each in its own process.
        costs: Whether to count FLOPs and measure milliseconds after the evaluations.
        protocol: Further options that must be equal for a saved evaluation to be used.
        on_evaluation: Called with (method, its episodes) after each evaluation, also one that was read.

    Raises:
        GridsError: If a policy cannot be loaded, methods have unequal numbers of policies, or a saved evaluation has
            other options.
    """
    if len({len(method.policies) for method in methods.values()}) > 1:
        counts = ", ".join(f"{name} {len(method.policies)}" for name, method in methods.items())
        raise GridsError(
            f"methods have unequal numbers of checkpoints ({counts}); give each method one per training seed"
        )
    protocol = {"episodes": episodes, "seed": seed, "batch_size": batch_size} | (protocol or {})
    # Errors in checkpoints are found here, before hours of evaluation.
    runs = [
        _Run(name, method, policy, protocol, folder / f"{name}-{number}.json", _fingerprint(policy))
        for name, method in methods.items()
        for number, policy in enumerate(method.policies)
    ]
    kept = [(run, found) for run in runs if (found := _kept(run)) is not None]
    there = {run.path for run, _ in kept}
    act = partial(_evaluate, make_env=make_env, batch_size=batch_size, device=device, tampering=tampering)
    evaluations: dict[Path, Evaluation] = {}
    for run, evaluation in chain(kept, _map(act, [run for run in runs if run.path not in there], workers)):
        evaluations[run.path] = evaluation
        if on_evaluation is not None:
            on_evaluation(run.name, evaluation.total.episodes)

    result = ComparisonResult(protocol, torch.get_num_threads())
    by_name = {name: [evaluations[run.path] for run in runs if run.name == name] for name in methods}
    reference = next(iter(by_name.values()))
    for name, ours in by_name.items():
        result.methods.append(_summarise(name, ours, None if ours is reference else reference))
    if costs:
        for method, row in zip(methods.values(), result.methods, strict=True):
            loaded = _load(method, method.policies[0], device)
            row.gflops, row.latency_ms = _costs(loaded, make_env())
            row.device = device_name(str(loaded.policy.config.device))
    return result


def _map(act: Callable[[_Run], Evaluation], runs: list[_Run], workers: int) -> Iterator[tuple[_Run, Evaluation]]:
    """Yield each run with its evaluation as soon as it is done."""
    if workers == 1:
        for run in runs:
            yield run, act(run)
        return
    threads = max(1, torch.get_num_threads() // workers)
    # spawn: a forked process would inherit an OpenGL context that it cannot use.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        pending = {pool.submit(act, run): run for run in runs}
        try:
            for future in as_completed(pending):
                yield pending[future], future.result()
        except BrokenProcessPool as error:
            raise GridsError(
                "a worker was killed, perhaps for lack of memory; finished results are kept, use fewer --workers"
            ) from error
        except BaseException:
            # Stop unfinished evaluations instead of waiting for them.
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _evaluate(
    run: _Run,
    make_env: Callable[..., EnvConfig],
    batch_size: int,
    device: str | None,
    tampering: list[str] | None,
) -> Evaluation:
    loaded = _load(run.method, run.policy, device)
    evaluation = evaluate(
        loaded,
        make_env(look_every=getattr(loaded.policy.config, "n_action_steps", 1)),
        episodes=run.protocol["episodes"],
        seed=run.protocol["seed"],
        batch_size=batch_size,
        source=run.policy,
        tampering=tampering,
    )
    evaluation.save(run.path, asked=run.asked)
    return evaluation


def _load(method: Method, policy: str, device: str | None) -> LoadedPolicy:
    return load(
        policy,
        device,
        method.tokens,
        reducer=method.reducer,
        resolution=method.resolution,
        num_steps=method.num_steps,
    )


def _kept(run: _Run) -> Evaluation | None:
    """The saved evaluation of a run; None if there is none."""
    if not run.path.is_file():
        return None
    try:
        found = json.loads(run.path.read_text())
        evaluation, was = Evaluation.from_dict(found), found["asked"]
    except (ValueError, KeyError, TypeError) as error:
        raise GridsError(f"{run.path} cannot be read ({error!r}); remove it to evaluate again") from error
    for name in [*run.asked, *was]:
        then, now = was.get(name), run.asked.get(name)
        if then != now:
            raise GridsError(
                f"{run.path} was evaluated with {name}={then}, now {now}; remove it, or choose another folder"
            )
    return evaluation


def _fingerprint(policy: str) -> str:
    """Hash of a checkpoint's weights, so that results of an earlier training are not used."""
    folder = find_weights(policy)
    require_complete(folder)
    return "+".join(digest_of(path)[:16] for path in sorted(folder.glob("*.safetensors")))


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
        met = [evaluation.total for evaluation in reference]
        if any(mine.seeds != other.seeds for mine, other in zip(totals, met, strict=True)):
            raise GridsError(f"'{name}' was not evaluated on the first method's episodes; remove its results")
        paired = paired_comparison([mine.outcomes for mine in totals], [other.outcomes for other in met])
    return MethodResult(
        name,
        evaluations[0].num_tokens,
        by_task,
        [total.success_rate for total in totals],
        successes,
        episodes,
        wilson_interval(successes / len(totals), episodes // len(totals)),
        paired,
    )


def _costs(loaded: LoadedPolicy, env_config: EnvConfig) -> tuple[float, float]:
    """(GFLOPs, median milliseconds) of one action chunk for one pre-processed observation."""
    config = loaded.policy.config
    observation: dict[str, Any] = {key: torch.rand(1, *feature.shape) for key, feature in config.image_features.items()}
    if config.robot_state_feature is not None:
        observation[OBS_STATE] = torch.zeros(1, *config.robot_state_feature.shape)
    batch = loaded.preprocessor(observation | {"task": [task_names(env_config)[0]]})
    flops = count_flops(loaded.policy, batch)
    latency, _ = measure_latency(loaded.policy, batch, warmup=3, repeats=15)
    return sum(flops.values()) / 1e9, latency["total"]
