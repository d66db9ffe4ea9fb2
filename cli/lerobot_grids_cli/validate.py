"""lerobot-grids validate."""

from lerobot_grids.budgets import budget_fault

from .messages import OptionError
from .parser import refuse, require_at_least, run


def validate(
    policy: str,
    dataset: str,
    tokens: str | None = None,
    teacher: str | None = None,
    num_steps: int | None = None,
    by_task: bool = False,
    frames: int = 512,
    val_fraction: float | None = None,
    batch_size: int = 32,
    device: str | None = None,
    picture: str | None = None,
    json: str | None = None,
    rename_map: dict[str, str] | None = None,
    tolerance_s: float = 1e-4,
    video_backend: str | None = None,
) -> None:
    """Measure loss and actions on held-out demonstrations at several token budgets, compared with the dense teacher.

    It takes seconds instead of minutes, but only `eval` measures success: a lower loss can mean less success.

    Args:
        policy: Checkpoint folder, output folder of a training run, or Hub id; dense or grids.
        dataset: Folder of a LeRobotDataset, or its id on the Hub.
        tokens: Budgets, comma-separated, such as 4,8,16. Defaults to common ones that the checkpoint supports.
        teacher: Dense policy; its action chunks from the same noise are compared with the policy's.
        num_steps: Integration steps of the policy's flow for one action chunk. Defaults to the checkpoint's; the
            teacher keeps its own.
        by_task: Whether to count where the points are in the frames of each task, too, and where they are if the
            policy is told the next task's instruction.
        frames: Validate on at most this many of the held-out frames, spread evenly.
        val_fraction: Share of the episodes that was held out. Defaults to the value in the run's fit.yaml, else 0.1.
        batch_size: Number of frames per batch.
        device: Device, such as cpu or cuda. Defaults to the checkpoint's, or to one that this machine has.
        picture: PNG file for a plot of loss over budget.
        json: JSON file for the result.
        rename_map: Names of dataset features -> the policy's names. Defaults to those of the training.
        tolerance_s: How far in seconds a video's frame may be from its time stamp.
        video_backend: Decoder of videos, "torchcodec" or "pyav". Defaults to the one that works here.

    Examples:
        lerobot-grids validate --policy outputs/grids16 --dataset me/my_robot_data
        lerobot-grids validate --policy outputs/grids16 --dataset me/my_robot_data --tokens 4,16 --teacher outputs/dense
        lerobot-grids validate --policy outputs/grids4 --dataset outputs/libero/object --by_task true
    """
    require_at_least(1, frames=frames, batch_size=batch_size)
    asked = None if tokens is None else [_budget(part) for part in str(tokens).split(",")]
    from pathlib import Path

    from lerobot_grids.console import counting_bar, report, require_writable
    from lerobot_grids.data import LeRobotDataModule, load_metadata
    from lerobot_grids.evaluation.open_loop import (
        Validation,
        budgets_of,
        draw_validation,
        held_out_share,
        require_held_out,
    )
    from lerobot_grids.evaluation.open_loop import validate as run_validation
    from lerobot_grids.evaluation.tables import print_validation
    from lerobot_grids.evaluation.task_points import points_by_task, require_anchors
    from lerobot_grids.policies import flow_steps, load, peek, token_counts
    from lerobot_grids.preflight.robot import check_acting
    from lerobot_grids.training.distillation import require_alike

    for path in (json, picture):
        if path is not None:
            require_writable(Path(path))
    # What does not fit is said before large weights are fetched.
    config, renames = peek(policy, rename_map)
    if rename_map is None:
        known = load_metadata(dataset).features
        renames = {old: new for old, new in renames.items() if old in known}
    data = LeRobotDataModule(
        dataset,
        batch_size=batch_size,
        val_fraction=held_out_share(policy) if val_fraction is None else val_fraction,
        max_val_frames=frames,
        rename_map=renames,
        tolerance_s=tolerance_s,
        video_backend=video_backend,
        cache="never",  # it would decode the training frames too
    )
    report([*data.findings, *check_acting(policy, config, data.features)])
    loaded = load(policy, device=device, rename_map=rename_map, num_steps=num_steps)
    budgets = budgets_of(loaded.policy, asked)
    if by_task:
        require_anchors(loaded.policy, policy)
    dense = None
    if teacher is not None:
        dense = load(teacher, device=device, rename_map=rename_map)
        require_alike(teacher, dense.policy.config, dense.preprocessor, loaded.policy.config, loaded.preprocessor)
    data.load(loaded.policy.config)
    used = len(data.val_dataset or [])  # type: ignore[arg-type]
    require_held_out(used)
    with counting_bar("validating", -(-used // batch_size) * len(budgets) * (1 + by_task), "batches") as bar:
        rows = run_validation(loaded, data, budgets, dense, bar.advance)
        if by_task:
            for row, tasks in zip(rows, points_by_task(loaded, data, budgets, bar.advance), strict=True):
                row.tasks = tasks
    kind, dense_tokens, steps = loaded.policy.config.type, token_counts(loaded.policy)[1], flow_steps(loaded.policy)
    result = Validation(policy, kind, dataset, teacher, used, dense_tokens, rows, steps)
    print_validation(result)
    if json is not None:
        result.save(Path(json))
    if picture is not None:
        draw_validation(result, Path(picture))
        print(f"picture: {picture}")


def _budget(text: str) -> int:
    """A number of tokens in a list."""
    refuse(budget_fault(text.strip()))
    if text.strip() == "dense":
        raise OptionError("--tokens dense: a budget is a number; give a dense policy as --policy")
    return int(text)


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(validate, "validate", arguments)
