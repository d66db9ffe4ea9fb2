"""Mistakes in a command line are answered before anything heavy is imported."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "lerobot", "lightning", "transformers", "matplotlib")
# Runs command lines one after the other, and says how each ended and what was imported by then.
SCRIPT = f"""
import contextlib, io, json, sys, time
from lerobot_grids_cli.main import main
for line in json.load(sys.stdin):
    start, error = time.process_time(), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(line)
        except SystemExit as stop:
            code = stop.code
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    print(json.dumps([code, error.getvalue(), heavy, time.process_time() - start]), flush=True)
"""
FIT, EVAL, BENCH = ["fit", "--dataset=d"], ["eval", "--policy=p"], ["bench", "--policy=p"]
CASES = [
    ([], 0, ""),
    (["--help"], 0, ""),
    (["fit", "--help"], 0, ""),
    (["evla"], 2, "'evla' is not a command; did you mean eval?"),
    ([*FIT, "--tokens", "-3"], 1, "--tokens -3 is no token budget; give visual tokens per camera"),
    ([*FIT, "--steps=0"], 1, "--steps 0; give at least 1"),
    ([*FIT, "--steps", "many"], 2, "--steps many; give a whole number (see"),
    ([*FIT, "--distill=1.5"], 1, "--distill 1.5; give the teacher's share of the loss, from 0 to 1"),
    ([*FIT, "--push_every=500"], 1, "--push_every 500 without --push"),
    ([*FIT, "--polcy", "p"], 1, "--polcy is not an option; did you mean --policy?"),
    ([*FIT, "--batch-size=8"], 1, "--batch-size is not an option; did you mean --batch_size?"),
    ([*FIT, "--trainr.devices=2", "--steps=4"], 1, "--trainr.devices is not an option"),
    ([*EVAL, "--episodes=-3"], 1, "--episodes -3; give at least 1"),
    ([*EVAL, "--tokens=-3"], 1, "--tokens -3; give at least 1"),
    ([*EVAL, "--polcy=p"], 2, "--polcy is not an option; did you mean --policy?"),
    ([*EVAL, "--tamper=smell"], 1, "tampering 'smell' is unknown; choose from image"),
    ([*EVAL, "--perturb=camera:4"], 1, "perturbation 'camera:4' has an unknown severity"),
    ([*EVAL, "p"], 2, "'p' is not expected here"),
    ([*BENCH, "--tokens=4,-3"], 1, "--tokens 4,-3 is not a list of positive numbers"),
    ([*BENCH, "--dtype=float8"], 2, "--dtype float8; give bfloat16, float32 (see"),
    ([*BENCH, "--train", "--device=cuda"], 1, "--device cuda with --train"),
    (["validate", "--policy=p", "--dataset=d", "--tokens=4,dense"], 1, "--tokens dense: a budget is a number"),
    (["compare", "a=x"], 1, "1 policies given; give at least two"),
    (["export", "p", "--tokens=-3"], 1, "--tokens -3; give at least 1"),
    (["export", "p", "--format=tflite"], 2, "--format tflite; give onnx, openvino, torch (see"),
    (["record", "--output=o", "--episodes=0"], 1, "--episodes 0; give at least 1"),
    ([*FIT, "--logger=wandbb"], 1, "--logger wandbb names no logger; choose from csv, tensorboard, wandb, trackio"),
    (["help", "serve"], 0, ""),
    (["bench"], 2, "the following arguments are required: policy"),
    (["doctor", "--tokens=16"], 1, "--tokens 16 without --policy"),
    (["doctor", "--policy=p", "--tokens=0"], 1, "--tokens 0 is no token budget"),
    (["serve", "p", "--port=70000"], 1, "--port 70000; give a port"),
    (["serve", "p", "--runtme=fast"], 2, "--runtme is not an option; did you mean --runtime?"),
    (["push", "p", "u/n", "--format=tar"], 2, "--format tar; give auto, adapter, full (see"),
    (["serve", "p", "--runtime=warp"], 2, "--runtime warp; give auto, eager, fast, compiled (see"),
    (["view", "--policy=p", "--dataset=d", "--rename_map={a"], 2, "--rename_map {a; give names and values, such as '{"),
    (["view", "--policy=p", "--dataset=d", "--film=maybe"], 2, "--film maybe; give true or false (see"),
    (["view", "--policy=p", "--dataset=d", "--tokens=4,,8"], 1, "--tokens '' is no token budget"),
]


@pytest.fixture(scope="module")
def answers():
    lines = json.dumps([line for line, _, _ in CASES])
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(line) or "nothing" for line, _, _ in CASES])
def test_a_mistake_is_answered_at_once(answers, number):
    _, expected, message = CASES[number]
    code, error, heavy, seconds = answers[number]
    assert code == expected, error
    assert message in error
    assert error.count("\n") == (1 if message else 0), error
    assert heavy == []
    # Of the processor, because a busy machine takes several times as long.
    assert seconds < 2


def test_options_of_lightning_and_of_reducers_are_no_mistakes():
    from lerobot_grids_cli.fit_checks import check_command_line

    check_command_line(["--tokens=dense", "--trainer.max_steps", "3", "--model.lr=1e-3", "--data.val_fraction=0"])
    check_command_line(["--reducer.type", "grids", "--reducer.condition_on", "[language]", "--tokens", "16"])
    check_command_line(["--config", "fit.yaml", "--print_config", "--resume", "--seed=3", "--seed_everything=1"])
    check_command_line(["--rename_map", '{"observation.image": "observation.images.top"}', "--schedule=elastic:4-64"])
