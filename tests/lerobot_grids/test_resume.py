"""A run that dies goes on as if nothing had happened, and its states are whole or absent."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file

from lerobot_grids.data import LeRobotDataModule
from lerobot_grids.data.frame_order import FrameOrder
from lerobot_grids.training.averaging import TrainedWeightsAverage
from lerobot_grids.training.checkpoints import RunCheckpoint
from lerobot_grids.training.module import GridsModule
from lerobot_grids.training.state import STATE_FILES, AtomicCheckpointIO, find_state, is_whole
from lerobot_grids_cli.fit_lightning import fit
from lerobot_policy_grids.errors import CheckpointError

STEPS = 8
HELPERS = Path(__file__).parents[1] / "helpers"


def options(dataset, policy, output, *more):
    """A run with everything that has a state: budget, teacher, looks, average, accumulation, validation."""
    return [
        *(f"--dataset={dataset}", f"--policy={policy}"),
        *(f"--output={output}", f"--steps={STEPS}", "--batch_size=4", "--tokens=4", "--schedule=elastic:2,4,9"),
        *("--distill=0.5", "--model.look_first=8", "--ema=0.9", "--save_every=2"),
        *("--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=2"),
        *("--trainer.enable_progress_bar=false", *more),
    ]


def saved_step(output):
    """Of the newest state; 0 while there is none, or while it takes the place of the one before."""
    with suppress(FileNotFoundError):
        return torch.load(output / STATE_FILES[0], weights_only=True)["global_step"]
    return 0


def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(tmp_path, dataset, dense_checkpoint):
    fit(options(dataset, dense_checkpoint, tmp_path / "whole"))
    output = tmp_path / "killed"
    moment = random.choice((2, 4))
    # It goes on for up to two steps after the moment, so that it may be killed while it writes.
    pause = ("--trainer.callbacks=pausing.Pause", f"--trainer.callbacks.step={moment + 2}")
    with subprocess.Popen(
        [Path(sys.executable).with_name("lerobot-grids"), "fit", *options(dataset, dense_checkpoint, output, *pause)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])},
    ) as process:
        while saved_step(output) < moment:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert torch.load(find_state(output)[0], weights_only=True)["global_step"] < STEPS
    fit(options(dataset, dense_checkpoint, output, "--resume=true"))

    one, two = (torch.load(tmp_path / name / STATE_FILES[0], weights_only=True) for name in ("whole", "killed"))
    averages = [state["callbacks"]["TrainedWeightsAverage"]["average"] for state in (one, two)]
    for ours, theirs in ((one["state_dict"], two["state_dict"]), averages):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
    policies = [load_file(tmp_path / name / "pretrained_model" / "model.safetensors") for name in ("whole", "killed")]
    for name, value in policies[0].items():
        assert torch.equal(value, policies[1][name]), name
    # The policy has the average, the state goes on from the weights.
    name = "reducer.query.weight"
    assert torch.equal(policies[0][name], averages[0][f"policy.{name}"])
    assert not torch.equal(policies[0][name], one["state_dict"][f"policy.{name}"])


class Terminate(lightning.Callback):
    """A SIGTERM at a given moment, as Lightning's handler notes it."""

    def __init__(self, batch=None, validation=False):
        self.batch, self.validation = batch, validation

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            trainer._signal_connector.received_sigterm = True

    def on_validation_batch_end(self, trainer, *args):
        if self.validation:
            trainer._signal_connector.received_sigterm = True


def train(dataset, policy, output, *callbacks, resume=None, of_module=None, **options):
    """In this process; returns the state that the run leaves."""
    lightning.seed_everything(0, verbose=False)
    data = LeRobotDataModule(str(dataset), batch_size=2, val_fraction=0.2, max_val_frames=4)
    module = GridsModule(data.meta, policy=str(policy), tokens=4, **of_module or {})
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=4,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[TrainedWeightsAverage(0.5), *callbacks, RunCheckpoint(output, every_n_steps=2)],
        **options,
    )
    with suppress(SIGTERMException):
        trainer.fit(module, data, ckpt_path=resume)
    return torch.load(output / STATE_FILES[0], weights_only=True)


def assert_same(one, two):
    assert one["global_step"] == two["global_step"]
    averages = [state["callbacks"]["TrainedWeightsAverage"]["average"] for state in (one, two)]
    for ours, theirs in ((one["state_dict"], two["state_dict"]), averages):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_terminated_within_an_accumulated_step(tmp_path, dataset, dense_checkpoint):
    """The state that is left is of a whole step, and going on twice from it changes nothing either."""
    options = {"accumulate_grad_batches": 2, "val_check_interval": 100}
    whole = train(dataset, dense_checkpoint, tmp_path / "whole", **options)
    output, state = tmp_path / "cut", tmp_path / "cut" / STATE_FILES[0]
    left = train(dataset, dense_checkpoint, output, Terminate(batch=4), **options)
    assert left["global_step"] == 2
    again = train(dataset, dense_checkpoint, output, Terminate(batch=6), resume=state, **options)
    assert again["global_step"] == 2
    assert_same(train(dataset, dense_checkpoint, output, resume=state, **options), whole)


def test_terminated_in_a_validation_that_uses_the_average(tmp_path, dataset, dense_checkpoint):
    options = {"val_check_interval": 3}
    whole = train(dataset, dense_checkpoint, tmp_path / "whole", **options)
    output, state = tmp_path / "cut", tmp_path / "cut" / STATE_FILES[0]
    assert train(dataset, dense_checkpoint, output, Terminate(validation=True), **options)["global_step"] == 3
    assert_same(train(dataset, dense_checkpoint, output, resume=state, **options), whole)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-3},
        {"jitter": 0.3},
        {"reducer": {"condition_on": ["language"]}},
        {"distill": 0.5},
        {"state_noise": 0.1},
    ],
    ids=str,
)
def test_every_option_of_a_training_step_belongs_to_the_run(options, tmp_path, dataset, dense_checkpoint):
    train(dataset, dense_checkpoint, tmp_path, val_check_interval=100)
    with pytest.raises(CheckpointError, match=rf"{next(iter(options))} .*\(now .*give the same options as before"):
        train(dataset, dense_checkpoint, tmp_path, resume=tmp_path / STATE_FILES[0], of_module=options)


def test_another_teacher_is_another_run(tmp_path, dataset, dense_checkpoint):
    other = tmp_path / "other"
    shutil.copytree(dense_checkpoint, other)
    options = [{"distill": 0.5, "teacher": str(teacher)} for teacher in (dense_checkpoint, other)]
    train(dataset, dense_checkpoint, tmp_path / "run", val_check_interval=100, of_module=options[0])
    with pytest.raises(CheckpointError, match=r"had teacher .*other"):
        train(
            dataset, dense_checkpoint, tmp_path / "run", resume=tmp_path / "run" / STATE_FILES[0], of_module=options[1]
        )


def test_other_options_than_before_are_named(tmp_path, dataset, dense_checkpoint):
    train(dataset, dense_checkpoint, tmp_path, val_check_interval=100)
    with pytest.raises(CheckpointError, match=r"had accumulate_grad_batches 1 \(now 2\)"):
        train(
            dataset,
            dense_checkpoint,
            tmp_path,
            resume=tmp_path / STATE_FILES[0],
            val_check_interval=100,
            accumulate_grad_batches=2,
        )


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path, capsys):
    writer = AtomicCheckpointIO()
    newest, previous = (tmp_path / name for name in STATE_FILES)
    for step in range(3):
        writer.save_checkpoint({"step": step, "weights": torch.full((5000,), float(step))}, newest)
    assert [writer.load_checkpoint(path)["step"] for path in (newest, previous)] == [2, 1]
    assert sorted(path.name for path in newest.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert find_state(tmp_path) == (newest, [])
    flip(newest)
    assert find_state(tmp_path) == (previous, [newest])
    previous.write_bytes(previous.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"last.ckpt and .*previous.ckpt damaged"):
        find_state(tmp_path)
    newest.unlink(), previous.unlink()
    with pytest.raises(CheckpointError, match="nothing to resume"):
        find_state(tmp_path)


def flip(path):
    """Change one bit in the middle of the weights."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_writer_that_dies_leaves_the_old_state(tmp_path, monkeypatch):
    writer, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"step": 1}, path)

    def full_disk(checkpoint, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        writer.save_checkpoint({"step": 2}, path)
    assert is_whole(path)
    assert writer.load_checkpoint(path) == {"step": 1}


def test_a_state_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"state": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert not marker.exists()


def test_processes_share_each_global_batch_and_every_pass_holds_every_frame_once():
    alone = FrameOrder(23, 6, seed=1)
    pair = [FrameOrder(23, 3, seed=1, rank=rank, world_size=2) for rank in range(2)]
    for number in range(12):
        assert alone.batch(number) == pair[0].batch(number) + pair[1].batch(number)
    for first in range(0, 9, 3):
        frames = [frame for number in range(first, first + 3) for frame in alone.batch(number)]
        assert len(set(frames)) == 18
        assert set(frames) <= set(range(23))
    assert alone.batch(0) != alone.batch(3)
    assert alone.batch(0) != FrameOrder(23, 6, seed=2).batch(0)


def test_the_state_before_stays_when_the_newest_was_damaged(tmp_path):
    """Else the next save would put the damaged one in its place."""
    from lerobot_grids_cli.fit_lightning import find_resumable

    writer, (newest, previous) = AtomicCheckpointIO(), (tmp_path / name for name in STATE_FILES)
    for step in range(2):
        writer.save_checkpoint({"step": step, "weights": torch.full((5000,), float(step))}, newest)
    flip(newest)
    assert find_resumable(tmp_path) == previous
    writer.save_checkpoint({"step": 5}, newest)
    assert is_whole(previous)
    assert writer.load_checkpoint(newest)["step"] == 5


def test_an_order_goes_on_where_it_is_told():
    begun, resumed = iter(FrameOrder(50, 4)), iter(FrameOrder(50, 4, first_batch=lambda: 30))
    batches = [next(begun) for _ in range(40)]
    assert [next(resumed) for _ in range(10)] == batches[30:]


def test_a_state_that_cannot_be_read_back_does_not_replace_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / STATE_FILES[0]
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, path)
    whole = torch.save

    def torn(content, file):
        whole(content, file)
        file.truncate(file.tell() // 2)

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(CheckpointError, match="cannot be read back"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 2}, path)
    assert torch.load(path, weights_only=True)["global_step"] == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]
