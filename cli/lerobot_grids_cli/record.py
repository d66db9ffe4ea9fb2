"""lerobot-grids record."""

from typing import Literal

from .parser import require_at_least, run


def record(
    output: str,
    env: Literal["metaworld"] = "metaworld",
    tasks: str = "push-v3,coffee-push-v3",
    episodes: int = 100,
    size: int = 96,
    noise: float = 0.2,
    seed: int = 5000,
    workers: int = 2,
    json: str | None = None,
) -> None:
    """Record demonstrations of a scripted expert as a LeRobotDataset that any LeRobot policy can learn from.

    Only successful episodes are kept; a failed one is repeated. The folder appears only when it is complete.

    Args:
        output: New folder of the dataset; it must not exist.
        env: Simulator to record in.
        tasks: Tasks, comma-separated. With several tasks, a policy learns them all by their instructions.
        episodes: Number of successful episodes of each task.
        size: Height and width of the camera image in pixels.
        noise: Standard deviation of the noise on the executed action, so that recoveries are recorded too.
        seed: First seed. Evaluate with other seeds (eval starts at 100000).
        workers: Number of processes that simulate.
        json: JSON file for the counts and times.
    """
    require_at_least(1, episodes=episodes, workers=workers)
    require_at_least(16, size=size)
    require_at_least(0, noise=noise)
    from lerobot_grids.console import counting_bar, write_json
    from lerobot_grids.simulation.metaworld import expand_tasks
    from lerobot_grids.simulation.recording import record as record_dataset

    with counting_bar("recording", len(expand_tasks(tasks)) * episodes, "episodes") as bar:
        count = record_dataset(
            output,
            tasks=tasks,
            episodes=episodes,
            size=size,
            noise=noise,
            seed=seed,
            workers=workers,
            on_episode=lambda episode: bar.advance(),
        )
    print(f"{count['episodes']} episodes, {count['frames']} frames in {bar.seconds:.0f} s -> {output}")
    print(f"next: lerobot-grids fit --policy tiny --tokens dense --dataset {output}")
    write_json(json, {**count, "seconds": bar.seconds, "tasks": expand_tasks(tasks), "size": size, "noise": noise})


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(record, "record", arguments)
