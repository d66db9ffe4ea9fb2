"""lerobot-grids record."""

import sys
from typing import Literal

from .parser import require_at_least, run


def record(
    output: str,
    env: Literal["metaworld", "libero"] = "metaworld",
    tasks: str | None = None,
    episodes: int = 100,
    size: int = 96,
    noise: float | None = None,
    layout: Literal["official", "dealt"] = "dealt",
    zoom: float = 1.0,
    seed: int = 5000,
    workers: int = 2,
    json: str | None = None,
) -> None:
    """Record demonstrations of a scripted expert as a LeRobotDataset that any LeRobot policy can learn from.

    Only successful episodes are kept; a failed one is repeated. The folder appears only when it is complete; Ctrl-C
    keeps the episodes that are finished. For LIBERO: --env libero --tasks libero_object --episodes 50.

    Args:
        output: New folder of the dataset; it must not exist.
        env: Simulator to record in.
        tasks: Tasks, comma-separated. With several tasks, a policy learns them all by their instructions. Defaults to
            push-v3,coffee-push-v3 of MetaWorld and to libero_object, whose ten tasks are libero_object_0 and so on.
        episodes: Number of successful episodes of each task.
        size: Height and width of the camera images in pixels.
        noise: Standard deviation of the noise on the executed action, so that recoveries are recorded too. Defaults to
            0.2 in MetaWorld and 0.15 in LIBERO, where the hand is also pushed aside now and then.
        layout: Where objects stand in LIBERO: in its official initial states, in which the named object hardly moves,
            or dealt anew in each episode.
        zoom: How many times larger LIBERO's overview camera draws, in whose own images objects have some 40 pixels.
        seed: First seed. Evaluate with other seeds (eval starts at 100000).
        workers: Number of processes that simulate.
        json: JSON file for the counts and times.

    Examples:
        lerobot-grids record --output data/push --tasks push-v3 --episodes 50
        lerobot-grids record --output data/four --episodes 100 --workers 2
    """
    require_at_least(1, episodes=episodes, workers=workers)
    require_at_least(16, size=size)
    require_at_least(0, noise=noise)
    require_at_least(1, zoom=zoom)
    from lerobot_grids.console import counting_bar, write_json
    from lerobot_grids.simulation.environments import make_demonstrator
    from lerobot_grids.simulation.recording import record as record_dataset

    demonstrator = make_demonstrator(env, tasks, size=size, noise=noise, layout=layout, zoom=zoom)
    asked = len(demonstrator.tasks) * episodes
    with counting_bar("recording", asked, "episodes") as bar:
        recorded = record_dataset(
            output,
            demonstrator,
            episodes=episodes,
            seed=seed,
            workers=workers,
            on_episode=lambda episode: bar.advance(),
        )
    print(f"{recorded.episodes} episodes, {recorded.frames} frames in {bar.seconds:.0f} s -> {output}")
    if recorded.stopped is None:
        print(f"next: lerobot-grids fit --policy tiny --tokens dense --dataset {output}")
    of_libero = {"layout": layout, "zoom": zoom} if env == "libero" else {"layout": None}
    options = {"tasks": demonstrator.tasks, "size": size, "noise": noise, **of_libero}
    count = {"episodes": recorded.episodes, "frames": recorded.frames}
    write_json(json, {**count, "seconds": bar.seconds, **options})
    if recorded.stopped is not None:
        print(
            f"lerobot-grids: stopped after {recorded.episodes} of {asked} episodes, which are kept as a dataset; for "
            f"all of them remove {output} and record again",
            file=sys.stderr,
        )
        raise SystemExit(130 if isinstance(recorded.stopped, KeyboardInterrupt) else 143)


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(record, "record", arguments)
