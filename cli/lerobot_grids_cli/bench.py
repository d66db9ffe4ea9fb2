"""lerobot-grids bench."""

from typing import Literal

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
    warmup: int = 2,
    repeats: int = 5,
    threads: int | None = None,
    picture: str | None = None,
    json: str | None = None,
) -> None:
    """Compare the costs of all visual tokens and of K: FLOPs per stage and, with --device, milliseconds.

    The costs are those of one action chunk at batch 1, with all its denoising or decoding steps. Architectures are
    built at their real size with random weights and need no download. Without --device, most need no memory either.

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
        warmup: Number of runs before timing starts.
        repeats: Number of timed runs.
        threads: Number of CPU threads. Defaults to torch's choice.
        picture: PNG file for a plot with stacked bars.
        json: JSON file for all results.
    """
    from pathlib import Path

    from rich.console import Console

    from lerobot_grids.console import write_json
    from lerobot_grids.profiling.bench import bench as run_bench
    from lerobot_grids.profiling.tables import draw_bench, print_bench
    from lerobot_policy_grids.errors import BudgetError

    def numbers(option: str, text: str | int | None, least: int = 1) -> list[int]:
        parts = [part.strip() for part in ("" if text is None else str(text)).split(",") if part.strip()]
        if not all(part.isdigit() and int(part) >= least for part in parts):
            kind = "positive numbers" if least else "numbers of layers"
            raise BudgetError(f"--{option} {text} is not a list of {kind}; give one or several, such as 4,16,64")
        return [int(part) for part in parts]

    require_at_least(1, cameras=cameras, repeats=repeats, language_tokens=language_tokens)
    require_at_least(0, warmup=warmup)
    budgets, resolutions = numbers("tokens", tokens), numbers("resolution", resolution)
    layers, steps = numbers("sample_after_layer", sample_after_layer, least=0), numbers("num_steps", num_steps)
    import torch

    from lerobot_grids.policies import checked_device

    if device is not None:
        checked_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    with Console(stderr=True).status("building") as status:
        result = run_bench(
            policy,
            budgets,
            reducers=[name.strip() for name in reducer.split(",")],
            layers=layers,
            steps=steps,
            cameras=cameras,
            language_tokens=language_tokens,
            resolutions=resolutions,
            dtype=dtype,
            device=device,
            warmup=warmup,
            repeats=repeats,
            on_progress=lambda name: status.update(f"measuring {name}"),
        )
    print_bench(result)
    write_json(json, result.to_dict())
    if picture is not None:
        draw_bench(result, Path(picture))
        print(f"picture: {picture}")


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(bench, "bench", arguments)
