"""lerobot-grids view."""

from lerobot_grids.budgets import budget_fault

from .messages import OptionError
from .parser import refuse, require_at_least, run

SPAWN = "spawn"


def view(
    policy: str,
    dataset: str,
    episode: int = 0,
    tokens: str | None = None,
    instruction: str | None = None,
    frames: int = 6,
    every: int = 1,
    max_frames: int | None = None,
    film: bool = True,
    rerun: str | None = None,
    reducer: str | None = None,
    output: str | None = None,
    batch_size: int = 16,
    device: str | None = None,
    json: str | None = None,
    rename_map: dict[str, str] | None = None,
    tolerance_s: float = 1e-4,
    video_backend: str | None = None,
) -> None:
    """Show where a policy looks along an episode of a dataset: points over the camera images, as a strip and a film.

    A disc is as wide as a token reads. Letterbox padding is hatched, and a point in it is a red cross.

    Args:
        policy: Checkpoint folder, output folder of a training run, or Hub id, of a policy with K tokens. --policy.path
            means the same.
        dataset: Folder of a LeRobotDataset, or its id on the Hub, of which only this episode's files are fetched.
        episode: Number of the episode, from 0.
        tokens: Budgets to show side by side, comma-separated, such as 4,8,16. Defaults to the checkpoint's own.
        instruction: Another instruction: where the policy would look if it were told this, beside the true one.
        frames: Number of frames on the strip, spread evenly over the episode.
        every: Show every n-th frame of the episode, to be faster.
        max_frames: Show at most so many frames, from the start of the episode.
        film: Whether to write the film; false is faster.
        rerun: Log images, points, states and actions to rerun: a file such as look.rrd, or "spawn" to open the viewer.
        reducer: Name of a reducer for a dense checkpoint, applied without training.
        output: Folder for looks.png, looks.mp4 and view.json. Defaults to outputs/view/<policy>-<episode>.
        batch_size: Number of frames per call of the policy.
        device: Device, such as cpu or cuda. Defaults to the checkpoint's, or to one that this machine has.
        json: JSON file for the figures, besides view.json.
        rename_map: Names of dataset features -> the policy's names. Defaults to those of the training.
        tolerance_s: How far in seconds a video's frame may be from its time stamp.
        video_backend: Decoder of videos, "torchcodec" or "pyav". Defaults to the one that works here.

    Examples:
        lerobot-grids view --policy outputs/run --dataset data/push --episode 3 --tokens 4,8,16
        lerobot-grids view --policy outputs/run --dataset data/push --instruction "open the drawer"
    """
    require_at_least(0, episode=episode)
    require_at_least(1, frames=frames, every=every, max_frames=max_frames, batch_size=batch_size)
    asked = None if tokens is None else [_budget(part) for part in str(tokens).split(",")]
    if rerun is not None and rerun != SPAWN and not rerun.endswith(".rrd"):
        raise OptionError(f'--rerun {rerun}; give a file that ends with .rrd, or "{SPAWN}" to open the viewer')
    from contextlib import ExitStack
    from pathlib import Path

    from lerobot_grids.console import counting_bar, require_writable
    from lerobot_grids.looks.episode import open_episode
    from lerobot_grids.looks.points import require_points
    from lerobot_grids.looks.rerun_log import require_rerun, rerun_log
    from lerobot_grids.looks.table import print_view
    from lerobot_grids.looks.view import budgets_to_show, show
    from lerobot_grids.policies import load, peek, short_name

    if rerun is not None:
        require_rerun(rerun)
    folder = Path(output or f"outputs/view/{short_name(policy, reducer)}-{episode}")
    # What does not fit is said before large weights are fetched.
    config, renames = peek(policy, rename_map)
    chosen = open_episode(
        policy,
        config,
        dataset,
        episode,
        every=every,
        most=max_frames,
        rename_map=renames,
        tolerance_s=tolerance_s,
        video_backend=video_backend,
    )
    largest = max(asked) if asked and reducer is not None else None
    loaded = load(policy, device=device, num_tokens=largest, rename_map=rename_map, reducer=reducer)
    grids = require_points(loaded.policy, policy)
    grids.use_runtime("eager")
    budgets = budgets_to_show(grids, asked)
    for path in (*([Path(json)] if json else []), *([Path(rerun)] if rerun not in (None, SPAWN) else []), folder / "x"):
        require_writable(path)
    with ExitStack() as stack:
        sinks = [] if rerun is None else [stack.enter_context(rerun_log(rerun, chosen))]
        bar = stack.enter_context(counting_bar("looking", len(chosen.frames), "frames"))
        result = show(
            loaded,
            chosen,
            budgets,
            folder,
            source=policy,
            dataset=dataset,
            other=instruction,
            frames=frames,
            film=film,
            sinks=sinks,
            act=rerun is not None,
            batch_size=batch_size,
            on_progress=bar.advance,
        )
    print_view(result)
    if json is not None:
        result.save(Path(json))
    for file in result.files:
        print(f"{'film:  ' if file.endswith('.mp4') else 'looks: '} {file}")
    if rerun not in (None, SPAWN):
        print(f"rerun:  {rerun} (open it with: rerun {rerun})")


def _budget(text: str) -> int:
    """A number of tokens in a list."""
    refuse(budget_fault(text.strip()))
    if text.strip() == "dense":
        raise OptionError("--tokens dense: a dense policy reads every cell, so it has no points; give a number")
    return int(text)


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    # LeRobot's name of the option.
    run(view, "view", [part.replace("--policy.path", "--policy", 1) for part in arguments])
