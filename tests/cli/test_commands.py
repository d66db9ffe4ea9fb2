"""The command line as a person meets it: help, bad input, exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lerobot_grids_cli.main import COMMANDS, main
from lerobot_grids_cli.messages import fail


def shell(*arguments, **environment):
    """Run the installed command, as a user would."""
    command = [Path(sys.executable).with_name("lerobot-grids"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | environment, check=False
    )


def refused(capsys, *arguments):
    """Run in this process; expect a failure of one line on standard error, and return the line."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error" in line]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err + captured.out
    return lines[0]


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("two\nlines\r\nof\ttext", "two lines of text"),
        ("\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b1m \u202egnp", "red ]0;title 1m gnp"),
        ("x" * 224_000 + "; do this", f"{'x' * 1000} … {'x' * 471}; do this"),
    ],
)
def test_an_error_is_one_plain_line_of_bounded_length(capsys, message, printed):
    assert fail(message) == 1
    assert capsys.readouterr().err == f"lerobot-grids: error: {printed}\n"


@pytest.mark.parametrize("arguments", [(), *((name,) for name in COMMANDS)], ids=lambda a: " ".join(a) or "top")
def test_help_is_quick_and_complete(arguments):
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        result = shell(*arguments, "--help")
        best = min(best, time.perf_counter() - start)
        assert result.returncode == 0, result.stderr
    assert best < (3 if arguments == ("fit",) else 1)
    if arguments:
        assert "--json" in result.stdout or arguments == ("fit",)
        assert result.stdout.partition("\nexamples:\n")[2].count("  lerobot-grids ") in (2, 3)
        # Every option says what it is, in words besides its type and default.
        for option in re.split(r"^  (?=--)", result.stdout, flags=re.MULTILINE)[1:]:
            words = re.sub(r"\((required|type)[^)]*", "", option).split()[2:]
            assert len(words) >= 3, option
    else:
        assert all(name in result.stdout for name in COMMANDS)


def test_help_teaches_every_perturbation_and_tampering():
    from lerobot_grids.choices import PERTURBATIONS, TAMPERINGS

    words = re.findall(r"[a-z]+", shell("eval", "--help").stdout)
    assert {*chain(*PERTURBATIONS.values()), *TAMPERINGS} <= set(words)


@pytest.mark.parametrize(
    "steps",
    [
        {"from lerobot_grids_cli.main import main; main(['--help'])": ("torch", "lightning", "lerobot")},
        {
            "import lerobot_policy_grids.modeling_grids": ("lightning", "jsonargparse", "lerobot_grids"),
            "import lerobot_grids_cli.fit_lightning": ("metaworld", "mujoco"),
        },
    ],
    ids=["help", "policy, then training"],
)
def test_light_imports(steps):
    report = "import sys\n" + "".join(
        f"{code}\nprint('found', [m for m in {forbidden!r} if m in sys.modules])\n" for code, forbidden in steps.items()
    )
    result = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in result.stdout.splitlines() if line.startswith("found")] == ["found []"] * len(steps)


def test_version_and_unknown_command():
    assert re.match(r"lerobot-grids \d", shell("--version").stdout)
    result = shell("fly")
    assert result.returncode == 2
    assert result.stderr == f"lerobot-grids: error: 'fly' is not a command; choose one of {', '.join(COMMANDS)}\n"


def test_errors_from_the_shell_have_no_traceback(tmp_path):
    result = shell("fit", "--dataset", str(tmp_path / "nothing"), "--output", str(tmp_path / "out"))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert "does not exist" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_old_python_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 11, 7, "final", 0))
    assert "3.12" in refused(capsys, "fit")


@pytest.fixture
def fit(dataset, tmp_path, capsys):
    """Refuse a fit and check that it wrote nothing."""

    def run(*arguments, **replaced):
        options = {"dataset": dataset, "output": tmp_path / "out", "steps": 1} | replaced
        flags = [f"--{name}={value}" for name, value in options.items()]
        line = refused(capsys, "fit", *flags, *arguments)
        assert not (tmp_path / "out").exists()
        return line

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens=0"], "--tokens 0 is no token budget"),
        (["--tokens=-3"], "--tokens -3 is no token budget"),
        (["--tokens=999"], "12 x 12 = 144"),
        (["--tokens=abc"], "--tokens abc is no token budget"),
        (["--policy=pi9"], "'pi9' is unknown"),
        (["--policy=./no/such/folder"], "is not a folder"),
        (["--data.max_val_frames=0"], "max_val_frames=0"),
        (["--trainer.val_check_interval=0.5"], "(from Lightning)"),
        (["--reducer=magic"], "'magic' is unknown"),
        (["--steps=0"], "--steps 0"),
        (["--batch_size=0"], "--batch_size 0"),
        (["--resume"], "nothing to resume"),
        (["--colour=red"], "colour"),
        (["--steps=many"], "steps"),
        (["--reducer.condition_on=[smell]"], "smell"),
        (["--policy=smolvla"], "cannot be fetched from the Hub"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_fit_refuses(fit, flags, message):
    assert message in fit(*flags)


def test_fit_refuses_datasets(fit, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "does not exist" in fit(dataset=tmp_path / "nothing")
    assert "holds no meta/info.json" in fit(dataset=empty)


def test_fit_refuses_other_cameras(fit, two_camera_dataset, dense_checkpoint):
    assert "--rename_map" in fit(f"--policy={dense_checkpoint}", dataset=two_camera_dataset)


def test_fit_refuses_an_existing_output(dataset, tmp_path, capsys):
    (tmp_path / "keep.txt").write_text("mine")
    assert "already exists" in refused(capsys, "fit", f"--dataset={dataset}", f"--output={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def damage(folder, how):
    weights = folder / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "broken processor":
        (folder / "policy_preprocessor.json").write_text("{")
    elif how == "no processors":
        (folder / "policy_preprocessor.json").unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif how == "unknown field":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"nonsense": 1}))
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "empty file":
        weights.write_bytes(b"")
    else:
        tensors = load_file(weights)
        name = "reducer.query.weight"
        if how == "missing key":
            del tensors[name]
        elif how == "extra key":
            tensors["extra"] = torch.zeros(1)
        elif how == "other shape":
            tensors[name] = tensors[name][:, :3].contiguous()
        elif how == "other dtype":
            tensors[name] = tensors[name].to(torch.int8)
        elif how == "not finite":
            tensors[name][0, 0] = float("nan")
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", "lacks model.safetensors"),
        ("broken processor", "cannot be read as JSON"),
        ("no processors", "lacks policy_preprocessor.json"),
        ("no config", "holds no config.json"),
        ("config is no JSON", "cannot be read as JSON"),
        ("unknown field", "is not a valid configuration"),
        ("truncated", "cannot be read"),
        ("empty file", "cannot be read"),
        ("missing key", "missing 'reducer.query.weight'"),
        ("extra key", "unexpected 'extra'"),
        ("other shape", ", 3), expected ("),
        ("other dtype", "has dtype torch.int8"),
        ("not finite", "holds NaN"),
    ],
)
def test_eval_refuses_damaged_checkpoints(grids_checkpoint, tmp_path, capsys, how, message):
    folder = tmp_path / "damaged"
    shutil.copytree(grids_checkpoint, folder)
    damage(folder, how)
    line = refused(capsys, "eval", "--policy", folder, "--output", tmp_path / "out")
    assert message in line
    assert str(folder) in line
    assert not (tmp_path / "out").exists()


def test_eval_verify_hashes_again(grids_checkpoint, tmp_path, capsys, monkeypatch):
    """A file whose size and time are as before is known by its remembered hash, unless it is to be verified."""
    from huggingface_hub import constants

    from lerobot_grids.policies import load
    from lerobot_policy_grids.checkpoint.manifest import write_manifest

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "checkpoint"
    shutil.copytree(grids_checkpoint, folder)
    write_manifest(folder)
    weights = folder / "model.safetensors"
    content, status = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 1
    with weights.open("r+b") as file:
        file.write(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    load(folder)
    assert "has SHA-256" in refused(
        capsys, "eval", "--policy", folder, "--verify", "--episodes=1", "--output", tmp_path
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy=tiny"], "random weights"),
        (["--policy=nobody/nothing"], "cannot be fetched from the Hub"),
        (["--tasks=push-v2"], "no task push-v2"),
        (["--env=gazebo"], "'gazebo' is unknown"),
        (["--tokens=37"], "1 .. 36"),
        (["--tokens=0"], "--tokens 0; give at least 1"),
        (["--episodes=0"], "--episodes 0"),
        (["--device=foo"], "device 'foo' is not available"),
        (["--env_args={max_steps: 0}"], "max_steps=0"),
        (["--env_args={max_steps: a}"], "max_steps='a'"),
        (["--json=/"], "is a folder"),
        (["--perturb=fog:1"], "perturbation 'fog' is unknown in metaworld; choose from camera"),
        (["--perturb=camera:7"], "one of 1, 2, 3"),
        (["--env=libero", "--perturb=camera:1"], "perturbation 'camera' is unknown in libero; choose from light"),
        (["--env=pusht", "--perturb=camera:1"], "'pusht' cannot be perturbed"),
        (["--tamper=smell"], "tampering 'smell' is unknown; choose from image"),
        (["--n_action_steps=99"], "chunks have 16 steps"),
        (["--num_steps=0"], "--num_steps 0; give at least 1"),
        (["--env=libero", "--tasks=libero_spatial"], "LIBERO is not installed"),
        (["--env=libero_plus"], "LIBERO-Plus is not installed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_refuses(dense_checkpoint, grids_checkpoint, tmp_path, capsys, arguments, message):
    flags = ["--policy", grids_checkpoint] if not arguments[0].startswith("--policy") else []
    line = refused(capsys, "eval", *flags, *arguments, "--output", tmp_path / "out")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_dense_policy_has_no_budget_to_set(dense_checkpoint, capsys):
    assert "no token budget to set" in refused(capsys, "eval", "--policy", dense_checkpoint, "--tokens=4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=fly-v3"], "no task fly-v3"),
        (["--episodes=0"], "--episodes 0"),
        (["--size=3"], "--size 3"),
        (["--env=gazebo"], "env"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_record_refuses(tmp_path, capsys, arguments, message):
    line = refused(capsys, "record", "--output", tmp_path / "demos", *arguments)
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_no_opengl_names_the_package(tmp_path, capsys, monkeypatch):
    from lerobot_grids.simulation import rendering

    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering, "find_library", lambda name: None)
    from lerobot_policy_grids.errors import SimulationError

    with pytest.raises(SimulationError, match="libosmesa6"):
        rendering.choose_renderer()


def test_opengl_falls_back_to_osmesa(monkeypatch):
    from lerobot_grids.simulation import rendering

    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering, "find_library", lambda name: "lib" if name == "OSMesa" else None)
    assert rendering.choose_renderer() == "osmesa"
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert rendering.choose_renderer() == "egl"


def test_options_from_a_file_and_back(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["record", "--output=x", "--episodes=7", "--print_config"])
    text = capsys.readouterr().out
    assert "episodes: 7" in text
    path = tmp_path / "record.yaml"
    path.write_text(text.replace("size: 96", "size: 3"))
    assert "--size 3" in refused(capsys, "record", "--config", path)


def test_record_fit_eval(tmp_path, capsys):
    """The three commands in a row, as the README has them, at the smallest size."""
    data, output = tmp_path / "demos", tmp_path / "run"
    assert main(["record", f"--output={data}", "--tasks=push-v3", "--episodes=2", "--workers=1"]) == 0
    fit = ["fit", f"--dataset={data}", "--steps=2", "--batch_size=4", "--trainer.accelerator=cpu"]
    assert main([*fit, "--tokens=dense", f"--output={output}-dense"]) == 0
    assert main([*fit, "--tokens=4", f"--policy={output}-dense", f"--output={output}"]) == 0
    arguments = ["--tasks=push-v3", "--episodes=1", '--env_args={"max_steps": 9}', f"--json={tmp_path}/r.json"]
    assert main(["eval", f"--policy={output}", f"--output={tmp_path}/eval", *arguments]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["num_tokens"], result["num_dense_tokens"], result["total"]["episodes"]) == (4, 144, 1)
    assert (tmp_path / "eval" / "looks.png").is_file()
    assert "95 % interval" in capsys.readouterr().out
    spoiled = ["--perturb=camera:2,noise:1", "--tamper=state", "--n_action_steps=4", f"--output={tmp_path}/spoiled"]
    assert main(["eval", f"--policy={output}", *spoiled, *arguments]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["perturb"], result["tamper"], result["n_action_steps"]) == ("camera:2,noise:1", ["state"], 4)
    assert (tmp_path / "spoiled" / "looks.png").is_file()
    printed = capsys.readouterr().out
    assert "perturbed: camera:2,noise:1" in printed
    assert "tampered with: state" in printed
