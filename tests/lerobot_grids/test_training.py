"""Training: it learns, it repeats, and what it writes can be loaded."""

import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning
import pytest
import torch
from lerobot.policies.factory import get_policy_class

from lerobot_grids.data import LeRobotDataModule, load_metadata
from lerobot_grids.policies import flow_steps, load, start
from lerobot_grids.training.checkpoints import RunCheckpoint
from lerobot_grids.training.module import GridsModule
from lerobot_grids.training.trainable import choose_trainable, training_bytes
from lerobot_grids_cli.main import main
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.errors import CheckpointError, GridsError, OutputExistsError
from lerobot_policy_grids.families import families
from recordings import dataset_of


def train(dataset, output, steps, seed=0, **options):
    """Train and return (module, validation losses)."""
    lightning.seed_everything(seed, verbose=False)
    data = LeRobotDataModule(str(dataset), batch_size=16, val_fraction=0.3)
    module = GridsModule(data.meta, **options)
    losses = []

    class Keep(lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append(float(trainer.callback_metrics["val/loss"]))

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=max(1, steps // 2),
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        callbacks=[Keep(), RunCheckpoint(output, every_n_steps=10**6)],
    )
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    return module, losses


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    module, losses = train(dataset, output, 60, tokens="16")
    return module, losses, output


def test_the_validation_loss_falls_well_below_its_start(trained):
    _, losses, _ = trained
    assert losses[-1] < 0.6 * losses[0], losses


def test_the_same_seed_gives_the_same_policy(dataset, tmp_path):
    states = [
        train(dataset, tmp_path / str(i), 6, seed=seed)[0].policy.state_dict() for i, seed in enumerate((3, 3, 4))
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_the_coordinates_move_away_from_their_anchors(trained):
    reducer = trained[0].policy.reducer
    assert reducer.query.weight.abs().max() > 0
    assert reducer.geometry.out.weight.abs().max() > 0


def test_the_exported_checkpoint_acts_like_the_trained_policy(trained, dataset):
    module, _, output = trained
    loaded = load(str(output))
    data = LeRobotDataModule(str(dataset))
    data.load(module.policy.config)
    batch = next(iter(data.val_dataloader()))
    batch = {key: value[:4] if isinstance(value, (torch.Tensor, list)) else value for key, value in batch.items()}
    batch["observation.image"] = batch["observation.image"].float() / 255
    noise = torch.randn(4, 16, 32)
    module.policy.eval()
    expected = module.policy.predict_action_chunk(module.loaded.preprocessor(dict(batch)), noise=noise)
    got = loaded.policy.predict_action_chunk(loaded.preprocessor(dict(batch)), noise=noise)
    assert torch.equal(got, expected)
    assert torch.equal(loaded.postprocessor(got), module.loaded.postprocessor(expected))


def test_a_policy_that_samples_inside_its_tower_trains_and_loads(dataset, dense_checkpoint, tmp_path):
    reducer = {"type": "grids", "sample_after_layer": 0}
    options = {"tokens": "9", "reducer": reducer, "train": "reducer", "distill": 0.5, "distill_map": 0.5}
    module, losses = train(dataset, tmp_path, 2, policy=str(dense_checkpoint), **options)
    assert all(loss > 0 for loss in losses)
    # What the position loss reads: the student's tokens behind the tower, and none of the teacher's.
    assert {tokens.shape[1:] for tokens in module._visual_tokens} == {(9, 128)}
    loaded = load(str(tmp_path))
    assert loaded.policy.seam.inside is not None
    for name, value in module.policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], value), name


def test_training_for_one_flow_step(dataset, dense_checkpoint, tmp_path):
    options = {"tokens": "9", "train": "reducer", "time_bias": 2.0, "one_step": 0.5}
    module, _ = train(dataset, tmp_path, 2, policy=str(dense_checkpoint), **options)
    assert module.trainer.callback_metrics["train/one_step"] > 0
    assert module.trainer.callback_metrics["val/one_step"] > 0
    assert "sample_time" not in vars(module.policy.base.model)
    assert flow_steps(load(str(tmp_path)).policy) == 2


def test_training_only_the_reducer_leaves_the_base_alone(dataset, dense_checkpoint, tmp_path):
    before = get_policy_class("tiny_smolvla").from_pretrained(dense_checkpoint).state_dict()
    module, _ = train(dataset, tmp_path, 3, policy=str(dense_checkpoint), tokens="9", train="reducer")
    after = module.policy.base.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert module.policy.reducer.query.weight.abs().max() > 0


def test_lora_is_merged_into_what_is_saved(dataset, dense_checkpoint, tmp_path):
    before = get_policy_class("tiny_smolvla").from_pretrained(dense_checkpoint).state_dict()
    options = {"policy": str(dense_checkpoint), "tokens": "9", "train": "reducer+lora", "lr": 1e-2}
    module, _ = train(dataset, tmp_path, 3, **options)
    trained = {name for name, p in module.policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name or name.startswith("reducer.") for name in trained)
    loaded = load(str(tmp_path)).policy
    changed = {name for name, value in loaded.base.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("q_proj" in n or "v_proj" in n or "_proj" in n or "action_time_mlp" in n for n in changed)
    data = LeRobotDataModule(str(dataset))
    data.load(module.policy.config)
    batch = module._prepare(next(iter(data.val_dataloader())), augment=False)
    noise = torch.randn(len(batch["action"]), 16, 32)
    module.policy.eval()
    expected = module.policy.predict_action_chunk(dict(batch), noise=noise)
    torch.testing.assert_close(loaded.predict_action_chunk(dict(batch), noise=noise), expected, atol=1e-5, rtol=1e-4)
    plain = start(str(dense_checkpoint), 9, data.meta).policy.eval()
    assert (plain.predict_action_chunk(dict(batch), noise=noise) - expected).abs().max() > 1e-3


def test_what_is_trained_follows_from_the_memory(dataset, dense_checkpoint):
    policy = start(str(dense_checkpoint), 9, load_metadata(str(dataset))).policy
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in policy.parameters()) - trainable
    assert training_bytes(policy) == 4 * (4 * trainable + frozen)  # float32: weights, gradients, two Adam states
    roomy = choose_trainable(policy, "a big GPU", 2**40)
    tight = choose_trainable(policy, "a small GPU", training_bytes(policy))
    assert roomy.train == "all"
    assert tight.train == "reducer+lora"
    assert "a small GPU has 0 GiB" in tight.reason
    assert "--model.train all" in tight.reason
    policy.base._get_default_peft_targets = lambda: None
    without = choose_trainable(policy, "a small GPU", training_bytes(policy))
    assert without.train == "reducer"
    assert "LeRobot has no LoRA for 'tiny_smolvla'" in without.reason


def test_recipes_add_up():
    assert all(family.recipe.batch % family.recipe.micro_batch == 0 for family in families().values())


def test_the_position_loss_is_no_part_of_the_checkpoint(trained):
    module, _, output = trained
    assert module.position_loss is not None
    assert {name.split(".")[0] for name in load(str(output)).policy.state_dict()} == {"base", "reducer"}


def test_dense_training_saves_a_policy_of_the_base_type(dataset, tmp_path):
    module, _ = train(dataset, tmp_path, 2, tokens="dense")
    assert module.position_loss is not None
    loaded = load(str(tmp_path)).policy
    assert loaded.config.type == "tiny_smolvla"
    assert not isinstance(loaded, GridsPolicy)


def test_blind_trains_without_looking(dataset, tmp_path):
    module, _ = train(dataset, tmp_path, 2, reducer="blind")
    assert module.policy.num_tokens == 0
    vision = module.policy.base.model.vlm_with_expert.get_vlm_model().vision_model
    assert all(parameter.grad is None for parameter in vision.parameters())


def test_two_cameras_without_positions(two_camera_dataset, tmp_path):
    module, losses = train(two_camera_dataset, tmp_path, 2, tokens="4")
    assert module.position_loss is None
    assert losses[-1] > 0
    assert module.policy.config.image_features.keys() == {"observation.images.top", "observation.images.wrist"}


@pytest.mark.parametrize("cache", ["auto", "never"])
def test_columns_that_no_policy_reads_are_left_out(tmp_path, cache):
    data = LeRobotDataModule(str(dataset_of(tmp_path / "noted", note=True)), cache=cache, num_workers=0)
    module = GridsModule(data.meta, tokens=4)
    data.load(module.policy.config)
    batch = next(iter(data.train_dataloader()))
    assert "note" not in batch
    loss, _ = module.policy.forward(module._prepare(batch, augment=False))
    assert loss > 0


def test_nothing_left_to_train(dataset, tmp_path):
    with pytest.raises(GridsError, match="nothing is left to train"):
        train(dataset, tmp_path, 1, reducer="blind", train="reducer")


def test_a_run_of_the_command_can_be_resumed(tmp_path, dataset, capsys):
    """The command's own logger, trainer and callbacks."""
    from lerobot_grids_cli.fit_lightning import fit

    output = tmp_path / "run"
    flags = [f"--dataset={dataset}", f"--output={output}", "--tokens=4", "--batch_size=4", "--save_every=2"]
    flags += ["--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
    fit([*flags, "--steps=4"])
    rows = list(csv.DictReader((output / "logs" / "csv" / "metrics.csv").open()))
    assert {int(row["step"]) for row in rows if row["train/loss"]} == {0, 1, 2, 3}
    assert (output / "fit.yaml").is_file()
    assert list((output / "logs" / "tensorboard").glob("events*"))
    assert sorted(path.name for path in output.rglob("*.ckpt")) == ["last.ckpt", "previous.ckpt"]
    assert load(str(output)).policy.num_tokens == 4
    # More steps with --resume start where the run stopped, keep its log, and decay over the new total.
    fit([*flags, "--steps=9", "--resume=true"])
    assert torch.load(output / "training_state" / "last.ckpt", weights_only=True)["global_step"] == 9
    more = list(csv.DictReader((output / "logs" / "csv-2" / "metrics.csv").open()))
    assert {int(row["step"]) for row in more if row["train/loss"]} == {4, 5, 6, 7, 8}
    assert (output / "logs" / "csv" / "metrics.csv").is_file()
    # The first step still has the rate that was saved with the optimiser.
    _, *rates = (float(row["train/lr"]) for row in more if row["train/lr"])
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.2 * rates[0]
    # What cannot go on says so before anything is touched.
    with pytest.raises(CheckpointError, match=r"had tokens 4 \(now 5\), .* give the same options"):
        fit([*(flag for flag in flags if "tokens" not in flag), "--tokens=5", "--steps=9", "--resume=true"])
    state = output / "training_state" / "last.ckpt"
    state.write_bytes(state.read_bytes()[:1000])
    fit([*flags, "--steps=9", "--resume=true"])
    assert "continuing from previous.ckpt, the previous state" in capsys.readouterr().err
    assert torch.load(state, weights_only=True)["global_step"] == 9
    shutil.rmtree(state.parent)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        fit([*flags, "--steps=9", "--resume=true"])
    with pytest.raises(OutputExistsError, match="remove it"):
        fit([*flags, "--steps=9"])


def test_distributed_training_and_accumulation(tmp_path, dataset):
    """`--trainer.strategy ddp` on two processes, and validation counted in optimiser steps."""
    output = tmp_path / "run"
    command = [Path(sys.executable).with_name("lerobot-grids"), "fit", f"--dataset={dataset}", f"--output={output}"]
    command += ["--tokens=4", "--steps=4", "--batch_size=4", "--save_every=2", "--trainer.accelerator=cpu"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accumulate_grad_batches=3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, timeout=280, env=environment)
    rows = list(csv.DictReader((output / "logs" / "csv" / "metrics.csv").open()))
    assert len([row for row in rows if row["val/loss"]]) == 4  # save_every caps at a quarter of the steps
    assert load(str(output)).policy.num_tokens == 4


def test_a_terminated_run_says_so_and_can_go_on(tmp_path, dataset):
    output = tmp_path / "run"
    command = [Path(sys.executable).with_name("lerobot-grids"), "fit", f"--dataset={dataset}", f"--output={output}"]
    command += ["--tokens=4", "--steps=100000", "--batch_size=4", "--save_every=3", "--trainer.accelerator=cpu"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while not (output / "pretrained_model").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)
        process.terminate()
        _, error = process.communicate(timeout=100)
    assert process.returncode == 143, error
    assert "terminated; continue with --resume, step " in error
    assert (output / "training_state" / "last.ckpt").is_file()
    assert load(str(output)).policy.num_tokens == 4


def test_ctrl_c_saves_the_step_and_gives_the_command_that_goes_on(tmp_path, dataset, capsys):
    output = tmp_path / "run"
    flags = [f"--dataset={dataset}", f"--output={output}", "--tokens=4", "--batch_size=4", "--data.val_fraction=0"]
    flags += ["--trainer.accelerator=cpu", "--steps=4", "--logger=csv", "--trainer.enable_progress_bar=false"]
    press = ["--trainer.callbacks=pausing.Press", "--trainer.callbacks.step=1"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *flags, "--resume", "false", *press])
        assert stop.value.code == 130
        said = capsys.readouterr().err
        assert "stopping after this step, which is saved; Ctrl-C again stops at once" in said
        line = said.splitlines()[-1]
        assert line.startswith(
            "lerobot-grids: interrupted; continue with --resume, step 2 is saved: lerobot-grids fit "
        )
        assert load(str(output)).policy.num_tokens == 4
        words = shlex.split(line[line.index("lerobot-grids fit") :])[1:]
        assert words == ["fit", *flags, *press, "--resume"]
        # Nobody presses at step 1 again, and the run is ended.
        assert main(words) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    state = torch.load(output / "training_state" / "last.ckpt", weights_only=False)
    assert state["global_step"] == 4


@pytest.mark.parametrize("tokens", [9, "dense"])
def test_a_frozen_vision_tower_stays_as_it_is(dataset, tokens):
    module = GridsModule(load_metadata(str(dataset)), policy="tiny", tokens=tokens, freeze_vision=True)
    trained = {name for name, parameter in module.policy.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any("vision_model" in name or "connector" in name for name in trained)
    assert any("lm_expert" in name for name in trained)
    assert any("reducer" in name for name in trained) == (tokens != "dense")
