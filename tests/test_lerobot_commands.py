"""LeRobot's own commands, unmodified, with this plugin installed."""

import json
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file


def lerobot(command, *arguments, timeout=280):
    """Run one of LeRobot's commands and return its output."""
    result = subprocess.run(
        [Path(sys.executable).with_name(command), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr


METAWORLD = (
    "--env.discover_packages_path=lerobot_grids.simulation",
    "--env.type=grids_metaworld",
    "--env.task=push-v3",
    "--env.max_steps=9",
    "--env.render_interval=8",
)


def test_lerobot_train_then_lerobot_eval(dataset, tmp_path):
    output = tmp_path / "train"
    lerobot(
        "lerobot-train",
        "--policy.type=grids",
        "--policy.base.type=tiny_smolvla",
        "--policy.num_tokens=9",
        "--policy.reducer.num_tokens_max=36",
        "--policy.schedule=steps:0=36,1=9",
        "--policy.device=cpu",
        "--policy.push_to_hub=false",
        "--dataset.repo_id=local/squares",
        f"--dataset.root={dataset}",
        f"--output_dir={output}",
        "--steps=2",
        "--batch_size=4",
        "--num_workers=0",
        "--log_freq=1",
        "--env_eval_freq=0",
        "--wandb.enable=false",
    )
    checkpoint = output / "checkpoints" / "last" / "pretrained_model"
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["type"], config["base"]["type"]) == ("grids", "tiny_smolvla")
    assert config["reducer"]["num_tokens"] == 9
    assert load_file(checkpoint / "model.safetensors")["reducer.schedule_step"] == 2
    evaluation = tmp_path / "eval"
    lerobot(
        "lerobot-eval",
        f"--policy.path={checkpoint}",
        "--policy.num_tokens=4",
        "--policy.device=cpu",
        *METAWORLD,
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--output_dir={evaluation}",
    )
    assert json.loads((evaluation / "eval_info.json").read_text())["overall"]["n_episodes"] == 1
