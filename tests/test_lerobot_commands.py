"""LeRobot's own commands, unmodified, with this plugin installed."""

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

from lerobot.configs import parser
from lerobot.configs.train import TrainPipelineConfig
from lerobot.rollout import RolloutConfig
from safetensors.torch import load_file


def shell(command, *arguments, timeout=280):
    """Run one of LeRobot's commands in a fresh process and return its output."""
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


def test_lerobot_train_then_lerobot_eval(dataset, lerobot, tmp_path):
    output = tmp_path / "train"
    shell(
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
    # More training from it, by path, with another budget within the maximum.
    lerobot(
        "train",
        arguments=(
            f"--policy.path={checkpoint}",
            "--policy.num_tokens=4",
            "--policy.device=cpu",
            "--policy.push_to_hub=false",
            "--dataset.repo_id=local/squares",
            f"--dataset.root={dataset}",
            f"--output_dir={tmp_path / 'more'}",
            "--steps=1",
            "--batch_size=4",
            "--num_workers=0",
            "--env_eval_freq=0",
            "--wandb.enable=false",
        ),
    )
    more = tmp_path / "more" / "checkpoints" / "last" / "pretrained_model"
    assert json.loads((more / "config.json").read_text())["reducer"]["num_tokens"] == 4
    evaluation = tmp_path / "eval"
    shell(
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


def test_lerobot_eval_of_a_dense_checkpoint(dense_checkpoint, lerobot, tmp_path):
    lerobot(
        "eval",
        arguments=(
            f"--policy.path={dense_checkpoint}",
            "--policy.device=cpu",
            *METAWORLD,
            "--eval.n_episodes=1",
            "--eval.batch_size=1",
            f"--output_dir={tmp_path / 'eval'}",
        ),
    )
    assert (tmp_path / "eval" / "eval_info.json").is_file()


def parse(monkeypatch, kind, *flags):
    """What a LeRobot command's configuration makes of these flags."""

    def keep(cfg: kind):
        return cfg

    monkeypatch.setattr(sys, "argv", ["lerobot", *map(str, flags)])
    return parser.wrap()(keep)()


def test_other_policies_still_parse_quickly(monkeypatch):
    """A choice field that contained ourselves would recurse for ever, in every LeRobot command."""
    flags = ("--dataset.repo_id=a/b", "--policy.type=act", "--policy.push_to_hub=false")
    start = time.perf_counter()
    assert parse(monkeypatch, TrainPipelineConfig, *flags).policy.type == "act"
    assert time.perf_counter() - start < 10  # 2 s on an idle machine; the failure this guards against never ends


def test_lerobot_rollout_parses_our_checkpoint(monkeypatch, grids_checkpoint):
    import_module("lerobot.scripts.lerobot_rollout")
    config = parse(
        monkeypatch,
        RolloutConfig,
        f"--policy.path={grids_checkpoint}",
        "--policy.num_tokens=25",
        "--robot.type=so101_follower",
        "--robot.port=/dev/null",
        "--robot.id=x",
        "--task=push",
        "--duration=1",
    )
    assert (config.policy.type, config.policy.reducer.num_tokens) == ("grids", 25)
