"""Compare the time per training step of `lerobot-grids fit` and `lerobot-train`, and with and without a teacher.

    python benchmarks/training_cost.py DATASET DENSE [--repeats 3] [--results FILE]

DATASET is a folder made by `lerobot-grids record`; DENSE is a dense tiny policy trained on it. Each command runs for a
few steps and for more steps, and the time per step follows from the difference, so that the start-up time cancels.
Repeats alternate between the commands. Beside each time are the FLOPs that `lerobot-grids bench --train` predicts.
"""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results as kept
from jsonargparse import auto_cli

from lerobot_grids.training.step_bench import dense_config
from lerobot_grids.training.step_cost import predict_step

SHORT, LONG, BATCH = 10, 70, 32


def rows(dataset: str, dense: str) -> dict[str, list[str]]:
    """Name -> command without the options for steps and output."""
    fit = ["lerobot-grids", "fit", f"--dataset={dataset}", f"--policy={dense}", "--tokens=16", f"--batch_size={BATCH}"]
    fit += ["--data.val_fraction=0", "--model.auxiliary_weight=0", "--trainer.enable_progress_bar=false"]
    lora = [*fit, "--model.train=reducer+lora"]
    train = ["lerobot-train", "--dataset.repo_id=local/data", f"--dataset.root={dataset}", f"--batch_size={BATCH}"]
    train += ["--policy.type=grids", "--policy.num_tokens=16", "--policy.base.type=tiny_smolvla", "--policy.device=cpu"]
    train += [f"--policy.base.pretrained_path={dense}/pretrained_model", "--policy.push_to_hub=false"]
    train += [
        "--save_checkpoint=false",
        "--wandb.enable=false",
        "--num_workers=2",
        "--log_freq=1000",
        "--env_eval_freq=0",
    ]
    return {
        "lerobot-train": train,
        "fit": fit,
        "fit, frames not cached": [*fit, "--data.cache=never", "--data.num_workers=2"],
        "fit, a teacher of its own": [*fit, "--distill=0.5"],
        "fit reducer+lora": lora,
        "fit reducer+lora, self-teacher": [*lora, "--distill=0.5"],
    }


def predicted_gflops(dense: str) -> dict[str, float]:
    """Name of a row -> GFLOPs of one training step."""
    config = dense_config(dense)

    def gflops(train: str, distill: bool = False) -> float:
        return predict_step(config, train, tokens=16, batch_size=BATCH, distill=distill).flops / 1e9

    whole = gflops("all")
    return {
        "lerobot-train": whole,
        "fit": whole,
        "fit, frames not cached": whole,
        "fit, a teacher of its own": gflops("all", distill=True),
        "fit reducer+lora": gflops("reducer+lora"),
        "fit reducer+lora, self-teacher": gflops("reducer+lora", distill=True),
    }


def run(command: list[str], steps: int) -> tuple[float, float]:
    """Run a command and return (seconds, peak resident MiB)."""
    with tempfile.TemporaryDirectory() as folder:
        flag = f"--output={folder}/run" if command[0] == "lerobot-grids" else f"--output_dir={folder}/run"
        arguments = [str(Path(sys.executable).with_name(command[0])), *command[1:], f"--steps={steps}", flag]
        start = time.perf_counter()
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(arguments, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status != 0:
            sys.exit((Path(folder) / "log").read_text())
    return seconds, usage.ru_maxrss / 1024


def main(dataset: str, dense: str, repeats: int = 3, results: str | None = None) -> None:
    """Measure, print and save."""
    commands, gflops = rows(dataset, dense), predicted_gflops(dense)
    steps: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, float] = dict.fromkeys(commands, 0.0)
    for _ in range(repeats):
        for name, command in commands.items():
            (short, _), (long, peak) = run(command, SHORT), run(command, LONG)
            steps[name].append((long - short) / (LONG - SHORT))
            memory[name] = max(memory[name], peak)
            print(f"{name}: {1000 * steps[name][-1]:.0f} ms per step", flush=True)
    seconds = {name: statistics.median(values) for name, values in steps.items()}
    for name, value in seconds.items():
        speed = f"{1000 * value:.0f} ms per step, {BATCH / value:.0f} samples/s"
        print(f"{name}: {speed}, {gflops[name]:.1f} GFLOPs per step predicted", flush=True)
    print(f"lerobot-train / fit: {seconds['lerobot-train'] / seconds['fit']:.2f}")
    what = {
        "batch": BATCH,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    lines = [
        {"kind": "training-cost", "command": name, "run": "main", "seconds_per_step": values}
        | {"peak_resident_mib": memory[name], "predicted_gflops": gflops[name]}
        | what
        for name, values in steps.items()
    ]
    if results is not None:
        kept.put(Path(results), lines)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    if shutil.which("lerobot-grids") is None and not Path(sys.executable).with_name("lerobot-grids").exists():
        sys.exit("lerobot-grids is not installed in this environment; run `make lint` once, then use .venv/bin/python")
    auto_cli(main, as_positional=True)
