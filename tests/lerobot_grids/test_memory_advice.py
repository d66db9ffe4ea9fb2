"""A step that runs out of memory is answered by what would fit."""

import re

import pytest
import torch

from lerobot_grids.profiling.architectures import make_config
from lerobot_grids.training import memory_advice
from lerobot_grids.training.memory_advice import advise, is_out_of_memory
from lerobot_grids.training.module import GridsModule
from lerobot_grids.training.step_cost import USABLE_SHARE, StepCost, predict_step
from lerobot_grids_cli import fit_lightning
from lerobot_grids_cli.main import main

MIB = 2**20


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_what_out_of_memory_is(error, expected):
    assert is_out_of_memory(error) is expected
    outer = ValueError("while training")
    outer.__cause__ = error
    assert is_out_of_memory(outer) is expected


def test_fit_says_what_would_fit(dataset, tmp_path, capsys, monkeypatch):
    def run_out(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity ...")

    # Between what 32 frames need and what less needs.
    cost = predict_step(make_config("tiny", 1), "all", tokens=144, batch_size=32)
    memory = round(cost.peak_of(20) / USABLE_SHARE)
    monkeypatch.setattr("lightning.Trainer.fit", run_out)
    monkeypatch.setattr(fit_lightning, "device_memory", lambda accelerator: ("a small GPU", memory))
    flags = [f"--dataset={dataset}", "--tokens=144", "--model.train=all", f"--output={tmp_path}/out", "--steps=2"]
    assert main(["fit", *flags, "--batch_size=32"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "out of memory on a small GPU" in line
    assert "a step of 32 frames needs about" in line
    assert "--tokens 16 (" in line
    assert "--model.train reducer+lora (" in line
    # About 20, because the dataset's states and actions are shorter than the architecture's.
    assert int(re.search(r"--batch_size (\d+) \(", line).group(1)) in range(17, 24)
    # This policy has none.
    assert "gradient_checkpointing" not in line
    assert "Traceback" not in line


def test_other_commands_say_it_in_one_line(monkeypatch, capsys):
    from lerobot_grids_cli import pull

    def run_out(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity ...")

    monkeypatch.setattr(pull, "main", run_out)
    assert main(["pull"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory" in line
    assert "--batch_size" in line


@pytest.fixture
def module(dataset):
    from lerobot_grids.data import load_metadata

    return GridsModule(load_metadata(str(dataset)), "tiny", 16, train="reducer")


def cost(activations, fixed=100 * MIB):
    return StepCost(8, 1, 1, 0, fixed, 0, 0, activations, activations, activations / 8, 0)


def test_where_no_change_fits_the_nearest_are_named(module, monkeypatch):
    changes = [("--a 1", {"tokens": 1}), ("--b 2", {"tokens": 2})]
    costs = {16: cost(80 * MIB), 1: cost(40 * MIB), 2: cost(90 * MIB)}
    monkeypatch.setattr(memory_advice, "_changes", lambda *args: iter(changes))
    monkeypatch.setattr(memory_advice, "predict_step", lambda config, **options: costs[options["tokens"]])
    line = advise(module, 8, "a GPU", 90 * MIB)
    assert "no single change fits, the nearest are --a 1 (0.1 GiB)" in line
    # It would need more.
    assert "--b" not in line
    assert "give --batch_size 4 (0.1 GiB) or --a 1 (0.1 GiB, up to 8 frames)" in advise(module, 8, "a GPU", 156 * MIB)


def test_where_nothing_can_be_predicted_the_options_are_named(module, monkeypatch):
    def predict(config, **options):
        raise NotImplementedError("the step depends on a value of type bool")

    monkeypatch.setattr(memory_advice, "predict_step", predict)
    line = advise(module, 8, "a GPU", 90 * MIB)
    assert line.startswith("out of memory on a GPU, which has 0.1 GiB; give a smaller --batch_size")
