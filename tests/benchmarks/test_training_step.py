"""benchmarks/training_step.py trains what it says, and its memory is what is predicted without running anything."""

import argparse
import json
import sys

import pytest
import torch

import kept_results
from lerobot_grids.profiling.architectures import make_config

script = kept_results.load_script("training_step")
TINY = ["--family", "tiny", "--cameras", "1", "--dtype", "float32", "--device", "cpu", "--warmup", "1"]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs the command, and returns its exit status and the lines that it wrote."""
    file = tmp_path / "rows.jsonl"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["training_step.py", *TINY, "--json", str(file), *map(str, arguments)])
        return script.main(), [json.loads(line) for line in file.read_text().splitlines()]

    return run


def test_fewer_tokens_need_less_and_what_is_predicted(measured, capsys):
    status, (dense, few, refused) = measured("--batch_size", 4, "--repeats", 2, "--tokens", 16, 500)
    assert status == 0
    for row in (dense, few):
        assert len(row["seconds"]) == 2
        assert row["peak_gib"] == pytest.approx(row["predicted_gib"], rel=0.03)
    assert few["peak_gib"] < dense["peak_gib"]
    assert (dense["tokens"], few["tokens"], few["batch_size"], few["train"]) == (None, 16, 4, "reducer+lora")
    assert refused["refused"].startswith("500 tokens per camera requested")
    said = capsys.readouterr().out.splitlines()
    assert f"{4 / (sum(few['seconds']) / 2):.1f} samples/s" in said[1]
    assert "refused: 500 tokens" in said[2]


def test_nothing_measured_is_a_failure(measured):
    """The dense policy has no reducer to train, and nothing has so many tokens."""
    status, rows = measured("--train", "reducer", "--tokens", 500)
    assert status == 1
    assert rows[0]["refused"] == "this reducer has no weights to train"


def test_a_step_changes_what_is_trained_alone():
    options = argparse.Namespace(device="cpu", train="reducer+lora", lora_rank=4)
    training = script.Training(make_config("tiny", 1, dtype="float32"), script.Row(16, 2), options)
    before = {name: value.clone() for name, value in training.policy.named_parameters()}
    losses = [float(training.step()) for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    changed = {name for name, value in training.policy.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("reducer.") or ".lora_" in name for name in changed)
    assert any(".lora_" in name for name in changed)
    assert any(name.startswith("reducer.") for name in changed)


def test_what_a_policy_lacks_is_said_in_one_line(measured, capsys):
    with pytest.raises(SystemExit) as end:
        measured("--gradient_checkpointing")
    assert end.value.code == 1
    assert "a 'tiny' policy has no gradient checkpointing" in capsys.readouterr().err
