"""lerobot-grids report."""

from typing import Any

from lerobot_grids.choices import parts

from .parser import require_at_least, run

# Weights of this size in MiB are loaded only to count their FLOPs; larger ones where --device is given.
QUICK_MIB = 200
# Budgets to show of a checkpoint that was trained for many.
USUAL = (4, 8, 16)


def report(
    checkpoint: str,
    output: str = "report.html",
    results: str | None = None,
    dataset: str | None = None,
    episode: int = 0,
    instruction: str | None = None,
    frames: int = 6,
    device: str | None = None,
    json: str | None = None,
) -> None:
    """Write one HTML page about a checkpoint: success, where it looks, costs, training, options and versions.

    The page holds everything in itself, opens offline and on a phone, and runs no script. What is not known yet says
    which command makes it.

    Args:
        checkpoint: Checkpoint folder, output folder of a training run, or Hub id.
        output: HTML file to write.
        results: Files that eval, compare, validate and bench wrote with --json, comma-separated. An evaluation of the
            dense policy is shown beside the checkpoint's.
        dataset: Show where the policy looks in this dataset: a folder, or an id on the Hub. Defaults to the dataset of
            the training, if it is on this machine.
        episode: Number of the episode to show.
        instruction: Another instruction, shown beside the episode's own.
        frames: Number of frames to show.
        device: Measure the costs on this device, such as cpu or cuda, where no result has them. Without it FLOPs are
            counted, of small checkpoints.
        json: JSON file for the figures of the page.

    Examples:
        lerobot-grids report outputs/run
        lerobot-grids report outputs/run --results result.json,dense.json,bench.json,validate.json
    """
    require_at_least(0, episode=episode)
    require_at_least(1, frames=frames)
    from dataclasses import asdict
    from functools import partial
    from pathlib import Path

    from rich.console import Console

    from lerobot_grids.console import require_writable, write_json
    from lerobot_grids.policies import checked_device, find_weights
    from lerobot_grids.reporting.report import gather, recorded_dataset, weights_mib, write

    if device is not None:
        checked_device(device)
    for path in filter(None, (output, json)):
        require_writable(Path(path))
    folder = find_weights(checkpoint, weights=False)
    shown = dataset or recorded_dataset(folder)
    draw: Any = (
        f"No dataset to show it in. Give one: lerobot-grids report {Path(checkpoint).name} --dataset DATASET"
        if shown is None
        else partial(_draw, checkpoint, shown, episode, instruction, frames)
    )
    quick = 0 < weights_mib(folder) <= QUICK_MIB
    count = partial(_count, checkpoint, device) if device is not None or quick else None
    with Console(stderr=True).status("gathering"):
        page = gather(checkpoint, [Path(name) for name in parts(results)], draw, count)
    write(page, Path(output))
    if json is not None:
        content = asdict(page) | {"picture": None if page.picture is None else asdict(page.picture.view)}
        for chart in (*content["charts"], *content["budgets"]):
            del chart["svg"]
        write_json(json, content)
    print(f"report: {output} ({Path(output).stat().st_size / 1024:.0f} KiB, opens offline)")
    if page.picture is None:
        print(f"not in it: where the policy looks. {page.why_no_picture}")


def _budgets(num_tokens: int, largest: int) -> list[int]:
    return sorted({num_tokens, *(k for k in USUAL if k <= largest and largest > num_tokens)})


def _draw(source: str, dataset: str, episode: int, other: str | None, frames: int, folder: Any) -> Any:
    """Draw where a checkpoint looks."""
    from lerobot_grids.looks.episode import open_episode
    from lerobot_grids.looks.points import require_points
    from lerobot_grids.looks.view import show
    from lerobot_grids.policies import load, peek

    config, renames = peek(source)
    chosen = open_episode(source, config, dataset, episode, rename_map=renames)
    loaded = load(source)
    policy = require_points(loaded.policy, source)
    policy.use_runtime("eager")
    budgets = _budgets(policy.num_tokens, policy.reducer.num_tokens_max)
    return show(loaded, chosen, budgets, folder, source=source, dataset=dataset, other=other, frames=frames, film=False)


def _count(source: str, device: str | None, facts: Any, path: Any) -> None:
    """Count, and with a device measure, the costs of a checkpoint."""
    from lerobot_grids.console import write_json
    from lerobot_grids.profiling.bench import bench

    budgets = _budgets(facts.num_tokens, facts.num_tokens_max or 0) if facts.num_tokens else []
    reducers = [facts.reducer] if facts.num_tokens else None
    write_json(path, bench(source, budgets, reducers=reducers, device=device).to_dict())


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(report, "report", arguments, positional=True)
