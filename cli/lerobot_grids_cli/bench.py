"""lerobot-grids bench."""

from typing import Any, Literal

from lerobot_grids.choices import parts

from .messages import OptionError
from .parser import require_at_least, run


def bench(
    policy: str,
    tokens: str = "16",
    reducer: str = "grids",
    sample_after_layer: str | int | None = None,
    num_steps: str | int | None = None,
    cameras: int = 2,
    language_tokens: int | None = None,
    resolution: str | None = None,
    device: str | None = None,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    runtime: Literal["eager", "fast", "compiled"] = "eager",
    quantise: Literal["none", "int8", "int8_dynamic"] = "none",
    precision: Literal["own", "fp32", "tf32", "bf16"] = "own",
    warmup: int = 2,
    repeats: int = 5,
    threads: int | None = None,
    train: bool = False,
    batch_size: int | None = None,
    distill: bool = False,
    picture: str | None = None,
    json: str | None = None,
) -> None:
    """Compare the costs of all visual tokens and of K: FLOPs per stage and, with --device, milliseconds.

    The costs are those of one action chunk at batch 1, with all its denoising or decoding steps. Architectures are
    built at their real size with random weights and need no download. Without --device, most need no memory either.

    With --train: the FLOPs and the memory of one training step, by what is trained, with and without gradient
    checkpointing, and the largest batch that fits common GPUs. Nothing is downloaded or trained.

    Args:
        policy: Name of a family, for its default architecture, or the checkpoint of a trained policy.
        tokens: Visual tokens per camera, one number or several, such as 4,16,64.
        reducer: Reducers to compare, one or several, such as grids,pool,fastv.
        sample_after_layer: Layers of the vision tower, one or several, such as 4,9. After each of them tokens are
            sampled inside the tower, besides after the whole tower.
        num_steps: Integration steps of the flow, one number or several, such as 10,2,1. Defaults to the policy's own.
        cameras: Number of cameras for an architecture; a checkpoint has a fixed number.
        language_tokens: Number of instruction tokens after padding. Defaults to the family's padded length.
        resolution: Sides in pixels of smaller images for the dense policy, to compare with, such as 112,56.
        device: Device on which to measure time, such as cpu or cuda. Without it only FLOPs are counted.
        dtype: Precision, for families that support both; LeRobot keeps their vision tower in float32.
        runtime: With --device: fast or compiled measures each budget on the fast path, too, and prints how far its
            action chunk is from the eager one.
        quantise: Weights of the fast path's trunk and action expert with 8 bits; needs torchao.
        precision: Precision of the fast path's products, as --policy.precision.
        warmup: Number of runs before timing starts.
        repeats: Number of timed runs.
        threads: Number of CPU threads. Defaults to torch's choice.
        train: Whether to predict a training step instead of acting, on the meta device, without weights or a GPU.
        batch_size: With --train, frames of the step. Defaults to the micro-batch of the family's recipe.
        distill: With --train, whether the step of a policy with K tokens also runs a dense teacher.
        picture: PNG file for a plot with stacked bars.
        json: JSON file for all results.

    Examples:
        lerobot-grids bench --policy lerobot/pi0_base --tokens 4,16,64
        lerobot-grids bench --policy tiny --tokens 4,16 --device cpu --runtime fast
        lerobot-grids bench --train --policy lerobot/pi0_base --tokens 16 --batch_size 8
    """
    require_at_least(1, cameras=cameras, repeats=repeats, language_tokens=language_tokens, batch_size=batch_size)
    require_at_least(1, threads=threads)
    require_at_least(0, warmup=warmup)
    options: dict[str, Any] = {
        "reducers": [name.strip() for name in reducer.split(",")],
        "cameras": cameras,
        "language_tokens": language_tokens,
        "dtype": dtype,
    }
    budgets, resolutions = _numbers("tokens", tokens), _numbers("resolution", resolution)
    layers, steps = _numbers("sample_after_layer", sample_after_layer, least=0), _numbers("num_steps", num_steps)
    if train:
        of_acting = {"device": device, "resolution": resolution, "picture": picture, "num_steps": num_steps}
        for name, value in (of_acting | {"sample_after_layer": sample_after_layer}).items():
            if value is not None:
                raise OptionError(f"--{name} {value} with --train: a training step is only predicted; drop one of them")
        _predict_steps(policy, budgets, options | {"batch_size": batch_size, "distill": distill}, json)
        return
    for name, given in (("batch_size", batch_size is not None), ("distill", distill)):
        if given:
            raise OptionError(f"--{name} without --train: one action chunk has batch 1 and no teacher; add --train")
    acting = (runtime, quantise, precision)
    if runtime == "eager" and (quantise, precision) != ("none", "own"):
        raise OptionError(f"--quantise {quantise} --precision {precision} are of the fast path; add --runtime fast")
    if runtime != "eager" and device is None:
        raise OptionError(f"--runtime {runtime} changes times and no FLOPs; add --device, such as cpu or cuda")
    from pathlib import Path

    import torch
    from rich.console import Console

    from lerobot_grids.console import write_json
    from lerobot_grids.policies import checked_device
    from lerobot_grids.profiling.bench import bench as run_bench
    from lerobot_grids.profiling.tables import draw_bench, print_bench

    if device is not None:
        checked_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    with Console(stderr=True).status("building") as status:
        result = run_bench(
            policy,
            budgets,
            **options,
            layers=layers,
            steps=steps,
            resolutions=resolutions,
            device=device,
            runtime=None if runtime == "eager" else acting,
            warmup=warmup,
            repeats=repeats,
            on_progress=lambda name: status.update(f"measuring {name}"),
        )
    print_bench(result)
    write_json(json, result.to_dict())
    if picture is not None:
        draw_bench(result, Path(picture))
        print(f"picture: {picture}")


def _predict_steps(policy: str, budgets: list[int], options: dict[str, Any], json: str | None) -> None:
    """Predict training steps, and show and save them."""
    from rich.console import Console

    from lerobot_grids.console import write_json
    from lerobot_grids.training.step_bench import bench_steps
    from lerobot_grids.training.step_table import print_steps

    with Console(stderr=True).status("building") as status:
        result = bench_steps(policy, budgets, **options, on_progress=lambda name: status.update(f"predicting {name}"))
    print_steps(result)
    write_json(json, result.to_dict())


def _numbers(option: str, text: str | int | None, least: int = 1) -> list[int]:
    """The numbers in a list such as 4,16,64."""
    numbers = parts(None if text is None else str(text))
    if not all(number.isdecimal() and int(number) >= least for number in numbers):
        kind = "positive numbers" if least else "numbers of layers"
        raise OptionError(f"--{option} {text} is not a list of {kind}; give one or several, such as 4,16,64")
    return [int(number) for number in numbers]


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(bench, "bench", arguments)
