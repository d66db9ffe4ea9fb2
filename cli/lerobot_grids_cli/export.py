"""lerobot-grids export."""

from typing import Literal

from lerobot_grids.choices import export_fault

from .parser import refuse, require_at_least, run


def export(
    policy: str,
    format: Literal["onnx", "openvino", "torch"] = "onnx",
    output: str | None = None,
    tokens: int | None = None,
    reducer: str | None = None,
    language_bucket: int | None = None,
    num_steps: int | None = None,
    task: str = "pick up the object",
    repeats: int = 5,
    threads: int | None = None,
    verify: bool = False,
    json: str | None = None,
) -> None:
    """Write a policy's prefill and denoising step as graphs for another runtime, with what a program needs around them.

    The graphs are then run once by that runtime on the CPU, beside the policy, from the same noise: the largest
    difference of the action chunk and the milliseconds of both are printed. Beyond a bound nothing is written. Cameras,
    visual tokens, instruction tokens and steps are fixed in the graphs.

    Args:
        policy: Checkpoint folder, output folder of a training run, or Hub id; dense or grids.
        format: onnx (extra onnx), openvino (extra openvino), or torch: programs of torch.export.
        output: Folder to write. Defaults to outputs/export/<policy>-<format and other options>.
        tokens: Visual tokens per camera, for a grids checkpoint up to its num_tokens_max, or for --reducer.
        reducer: Reducer to apply to a dense policy without training, such as uniform or pool.
        language_bucket: Instruction tokens of the graphs. Defaults to as many as the policy reads at most; fewer are
            faster, and longer instructions do not fit.
        num_steps: Integration steps of the flow for one action chunk. Defaults to the checkpoint's.
        task: Instruction of the observation on which graphs and policy are compared.
        repeats: Number of timed runs.
        threads: Number of CPU threads. Defaults to torch's choice.
        verify: Hash the checkpoint's files, and an adapter's base, again.
        json: Further JSON file for what is written to export.json.

    Examples:
        lerobot-grids export tiny_metaworld --format onnx
        lerobot-grids export outputs/grids16 --format openvino --tokens 8 --language_bucket 32
    """
    require_at_least(1, tokens=tokens, language_bucket=language_bucket, num_steps=num_steps)
    require_at_least(1, repeats=repeats, threads=threads)
    refuse(export_fault(format))
    from pathlib import Path

    import torch
    from rich.console import Console

    from lerobot_grids.console import require_writable, write_json
    from lerobot_grids.exporting import export as run_export
    from lerobot_grids.exporting import print_export
    from lerobot_grids.policies import load, short_name
    from lerobot_policy_grids.checkpoint.atomic import require_absent

    steps = None if num_steps is None else f"{num_steps}steps"
    name = short_name(policy, reducer, tokens, language_bucket, steps, format)
    folder = Path(output or Path("outputs/export") / name)
    require_absent(folder)
    if json is not None:
        require_writable(Path(json))
    if threads is not None:
        torch.set_num_threads(threads)
    with Console(stderr=True).status("loading") as status:
        loaded = load(policy, device="cpu", num_tokens=tokens, reducer=reducer, num_steps=num_steps, verify=verify)
        result = run_export(
            loaded,
            folder,
            format,
            task=task,
            language_bucket=language_bucket,
            repeats=repeats,
            on_progress=status.update,
        )
    print_export(result)
    write_json(json, result.constants)


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    # Other commands have an option for what is the only argument here.
    arguments = [argument.removeprefix("--policy=") for argument in arguments if argument != "--policy"]
    run(export, "export", arguments, positional=True)
