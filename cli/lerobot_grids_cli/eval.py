"""lerobot-grids eval."""

from typing import Any, Literal

from lerobot_grids.choices import perturbation_fault, tampering_fault

from .parser import refuse, require_at_least, run


def evaluate(
    policy: str,
    env: str = "metaworld",
    tasks: str | None = None,
    episodes: int = 50,
    tokens: int | None = None,
    reducer: str | None = None,
    resolution: int | None = None,
    seed: int = 100_000,
    batch_size: int = 10,
    device: str | None = None,
    videos: int = 1,
    output: str | None = None,
    json: str | None = None,
    env_args: dict[str, Any] | None = None,
    rename_map: dict[str, str] | None = None,
    perturb: str | None = None,
    layout: Literal["official", "dealt"] | None = None,
    tamper: str | None = None,
    n_action_steps: int | None = None,
    num_steps: int | None = None,
    verify: bool = False,
) -> None:
    """Measure a policy's closed-loop success with its 95 % Wilson interval, and film the sampled points.

    Rollouts use LeRobot's own evaluation code. Films and looks.png are written to the output folder. For LIBERO, give
    suites as tasks: --env libero --tasks libero_spatial,libero_object,libero_goal,libero_10 --batch_size 1 --videos 0.

    Args:
        policy: Checkpoint folder, output folder of a training run, or Hub id; dense or grids.
        env: "metaworld" (fast side camera), or any environment type of LeRobot, such as pusht, libero, libero_plus.
        tasks: Tasks of the environment, comma-separated. Defaults to the environment's default tasks.
        episodes: Number of episodes of each task.
        tokens: Visual tokens per camera, for a grids checkpoint up to its num_tokens_max, or for --reducer.
        reducer: Reducer to apply to a dense policy without training, such as uniform, pool or fastv.
        resolution: Side in pixels of smaller images for a dense policy, without training.
        seed: Seed of the first episode; the others have the next seeds.
        batch_size: Number of episodes that run in parallel.
        device: Device, such as cpu or cuda. Defaults to the checkpoint's, or to one that this machine has.
        videos: Number of episodes of each task to film; 0 for none. Films are extra rollouts with other noise, so an
            episode may end differently in its film.
        output: Folder for films and result.json. Defaults to outputs/eval/<policy>-<other options>.
        json: Further JSON file for the result.
        rename_map: Names of the environment's observations -> the policy's names, where they differ.
        env_args: More fields of the environment's configuration, such as '{"max_steps": 300}'.
        perturb: Perturb episodes by kind:severity, comma-separated, such as camera:2,light:1. Kinds in MetaWorld:
            camera, light, background, noise, robot (its start), layout, instruction. In LIBERO: light, noise, view
            (field of view), occlusion and novel (of the named object). Severities: 1, 2, 3. The perturbation depends
            on the episode's seed, so every policy gets the same episodes.
        layout: Where objects stand in LIBERO: in its official initial states, in which the named object hardly moves,
            or dealt anew by each episode's seed, the same for every policy. Defaults to official.
        tamper: Remove or shuffle inputs, to test whether the policy uses them, comma-separated: image (black), patches
            (of the image, shuffled), tokens (visual tokens, shuffled), instruction (another task's), state (its mean).
        n_action_steps: Number of steps of each action chunk to execute before the next observation. Defaults to the
            checkpoint's.
        num_steps: Integration steps of the flow for one action chunk. Defaults to the checkpoint's.
        verify: Hash the checkpoint's files, and an adapter's base, again.
    """
    require_at_least(1, episodes=episodes, batch_size=batch_size, tokens=tokens, resolution=resolution)
    require_at_least(1, n_action_steps=n_action_steps, num_steps=num_steps)
    require_at_least(0, videos=videos)
    refuse(tampering_fault(tamper) or perturbation_fault(perturb, env))
    from pathlib import Path

    from lerobot_grids.console import counting_bar, require_writable
    from lerobot_grids.evaluation.films import film
    from lerobot_grids.evaluation.rollouts import check_fit
    from lerobot_grids.evaluation.rollouts import evaluate as run_episodes
    from lerobot_grids.evaluation.tables import print_evaluation
    from lerobot_grids.evaluation.tampering import parse_tamperings
    from lerobot_grids.policies import load, peek, short_name
    from lerobot_grids.simulation.environments import make_env_config

    tampering = parse_tamperings(tamper)
    steps = None if num_steps is None else f"{num_steps}steps"
    options = (short_name(policy, reducer, tokens, resolution), steps, perturb, layout, tamper)
    name = "-".join(filter(None, options))
    folder = Path(output or Path("outputs/eval") / name.replace(":", "").replace(",", "-"))
    # Errors in the environment, and what does not fit it, are found before large weights are fetched.
    env_config = make_env_config(env, tasks, env_args, perturb=perturb, layout=layout)
    check_fit(*peek(policy, rename_map), env_config)
    loaded = load(
        policy,
        device=device,
        num_tokens=tokens,
        rename_map=rename_map,
        reducer=reducer,
        resolution=resolution,
        n_action_steps=n_action_steps,
        num_steps=num_steps,
        verify=verify,
    )
    chunk = getattr(loaded.policy.config, "n_action_steps", 1)
    env_config = make_env_config(env, tasks, env_args, look_every=chunk, perturb=perturb, layout=layout)
    # Check the output paths before minutes of simulation.
    for path in (*([Path(json)] if json else []), folder / "result.json"):
        require_writable(path)
    with counting_bar("evaluating", None, "episodes") as bar:
        done: dict[str, int] = {}

        def show(task: str, episodes_done: int, successes: int) -> None:
            bar.advance(episodes_done - done.get(task, 0), f"{task} {successes}/{episodes_done}")
            done[task] = episodes_done

        result = run_episodes(
            loaded,
            env_config,
            episodes=episodes,
            seed=seed,
            batch_size=batch_size,
            source=policy,
            tampering=tampering,
            on_start=bar.expect,
            on_progress=show,
        )
    result.save(folder / "result.json")
    if json is not None:
        result.save(Path(json))
    print_evaluation(result)
    print(f"result: {folder / 'result.json'}")
    if videos:
        filmed = make_env_config(env, tasks, env_args, look_every=1, perturb=perturb, layout=layout)
        for path in film(loaded, filmed, folder, episodes=videos, seed=seed, tampering=tampering):
            print(f"film:   {path}" if path.suffix == ".mp4" else f"looks:  {path}")


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(evaluate, "eval", arguments)
