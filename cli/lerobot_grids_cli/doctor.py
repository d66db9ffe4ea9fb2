"""lerobot-grids doctor."""

from .messages import OptionError, one_line
from .parser import require_at_least, run


def doctor(
    policy: str | None = None,
    dataset: str | None = None,
    tokens: int | str | None = None,
    rename_map: dict[str, str] | None = None,
    batch_size: int | None = None,
    gpu_memory: float | None = None,
    json: str | None = None,
) -> None:
    """Check this machine, and with --policy or --dataset whether a training would fit, before anything is fetched.

    Each line says ok, warn or fail, what was seen, and what to do. The exit code is 1 if anything failed. With a
    policy: the memory of a training step and the largest batch. With a dataset: what is wrong with it. With both:
    which camera goes where. Of what is on the Hub it fetches configuration and metadata, but no weights or videos.

    Args:
        policy: Policy to train: the name of a family, a checkpoint folder, or a Hub id.
        dataset: Folder of a LeRobotDataset, or its id on the Hub.
        tokens: Visual tokens per camera, or 'dense' for all. Defaults to 16, or to the checkpoint's number.
        rename_map: Names of dataset features -> the policy's names: '{"observation.image": "observation.images.top"}'.
        batch_size: Frames of the training step. Defaults to the micro-batch of the family's recipe.
        gpu_memory: Memory in GiB of a GPU to plan for. Defaults to this machine's GPU, or its memory without one.
        json: JSON file for all lines.

    Examples:
        lerobot-grids doctor
        lerobot-grids doctor --policy lerobot/pi0_base --tokens 24 --dataset me/my_robot_data
        lerobot-grids doctor --policy lerobot/pi0_base --gpu_memory 24
    """
    from lerobot_grids.budgets import budget_fault
    from lerobot_grids.doctor import MACHINE, plan_checks, run_checks

    if tokens is not None and (fault := budget_fault(str(tokens))):
        raise OptionError(fault)
    require_at_least(1, batch_size=batch_size, gpu_memory=gpu_memory)
    needing = {"tokens": tokens, "batch_size": batch_size, "gpu_memory": gpu_memory}
    for name, value in needing.items():
        if value is not None and policy is None:
            raise OptionError(f"--{name} {value} without --policy: there is nothing to fit; give --policy")
    if rename_map is not None and dataset is None:
        raise OptionError("--rename_map without --dataset: there is nothing to rename; give --dataset")
    found = []
    checkers = list(MACHINE)
    if policy is not None or dataset is not None:
        checkers += plan_checks(policy, dataset, tokens, rename_map or {}, batch_size, gpu_memory)
    for check in run_checks(checkers):
        # At once: some take seconds.
        print(f"{check.status:<4}  {one_line(check.text)}", flush=True)
        found.append(check)
    counts = {status: sum(check.status == status for check in found) for status in ("ok", "warn", "fail")}
    print(f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
    if json is not None:
        from lerobot_grids.console import write_json

        write_json(json, {"checks": [check.to_dict() for check in found], **counts})
    if counts["fail"]:
        raise SystemExit(1)


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(doctor, "doctor", arguments)
