"""The curve over budgets."""

import json

import pytest
import torch

from lerobot_grids.data import LeRobotDataModule
from lerobot_grids.evaluation.open_loop import budgets_of, held_out_share, validate
from lerobot_grids.evaluation.task_points import points_by_task
from lerobot_grids.policies import load
from lerobot_grids_cli.main import main
from lerobot_policy_grids.errors import BudgetError


def data_of(dataset):
    return LeRobotDataModule(str(dataset), batch_size=16, val_fraction=0.3, max_val_frames=16)


def test_the_dense_policy_is_at_no_distance_from_itself(dataset, dense_checkpoint):
    (row,) = validate(load(str(dense_checkpoint)), data_of(dataset), [None], load(str(dense_checkpoint)))
    assert row.teacher_distance == 0
    assert row.num_tokens is None
    assert len(row.error) == 4


def test_loss_and_distance_are_those_of_plain_calls(dataset, dense_checkpoint, grids_checkpoint):
    loaded, teacher = load(str(grids_checkpoint)), load(str(dense_checkpoint))
    data = data_of(dataset)
    rows = validate(loaded, data, [4, 36], teacher)
    (raw,) = data.val_dataloader()
    batch = loaded.preprocessor(dict(raw) | {"observation.image": raw["observation.image"].float() / 255})
    for row, k in zip(rows, (4, 36), strict=True):
        loaded.policy.num_tokens = k
        with torch.no_grad():
            torch.manual_seed(0)
            loss, _ = loaded.policy.forward(dict(batch))
            torch.manual_seed(0)
            ours = loaded.policy.predict_action_chunk(dict(batch))
            torch.manual_seed(0)
            theirs = teacher.policy.predict_action_chunk(dict(batch))
        assert row.loss == pytest.approx(loss.item(), rel=1e-5)
        assert row.teacher_distance == pytest.approx((ours - theirs).square().mean().sqrt().item(), rel=1e-4)
        inside = ~raw["action_is_pad"]
        error = (loaded.postprocessor(ours) - raw["action"])[inside].square().mean(0).sqrt()
        torch.testing.assert_close(torch.tensor(row.error), error, rtol=1e-4, atol=1e-6)


def test_points_are_counted_task_by_task(placed_dataset, grids_checkpoint):
    loaded, data = load(str(grids_checkpoint)), data_of(placed_dataset)
    whole = validate(loaded, data, [1, 16])
    found = points_by_task(loaded, data, [1, 16])
    (raw,) = data.val_dataloader()
    tasks = list(raw["task"])
    pixels = {"observation.image": raw["observation.image"].float() / 255}
    exchange = dict(zip(dict.fromkeys(tasks), reversed(dict.fromkeys(tasks)), strict=True))
    seen = []
    for texts in (tasks, [exchange[task] for task in tasks]):
        with torch.no_grad():
            loaded.policy.forward(loaded.preprocessor(dict(raw) | pixels | {"task": texts}))
        seen.append(loaded.policy.seam.coordinates[0] * 12)
    assert loaded.policy.num_tokens == 16
    for row, by_task in zip(whole, found, strict=True):
        assert {task: points.frames for task, points in by_task.items()} == {task: tasks.count(task) for task in tasks}
        for name in ("on_object", "anchors_on_object"):
            shares = sum(getattr(points, name) * points.frames for points in by_task.values()) / len(tasks)
            assert shares == pytest.approx(row.coordinates[name])
    for task, points in found[1].items():
        own = [i for i, text in enumerate(tasks) if text == task]
        places = raw["auxiliary.places"][own, None] * 12
        moved = (seen[1] - seen[0])[own].norm(dim=-1).mean().item()
        assert points.told_otherwise_cells == pytest.approx(moved, rel=1e-4)
        assert moved > 0
        hits = ((seen[1][own] - places).norm(dim=-1) <= 1).any(1).float().mean().item()
        assert points.on_object_told_otherwise == pytest.approx(hits)


def test_budgets(grids_checkpoint, dense_checkpoint):
    policy = load(str(grids_checkpoint)).policy
    assert budgets_of(policy, None) == [1, 4, 8, 16, 24, 36]
    assert budgets_of(policy, [2, 36]) == [2, 36]
    with pytest.raises(BudgetError, match=r"1 \.\. 36"):
        budgets_of(policy, [37])
    dense = load(str(dense_checkpoint)).policy
    assert budgets_of(dense, None) == [None]
    with pytest.raises(BudgetError, match="drop --tokens"):
        budgets_of(dense, [4])


def test_a_teacher_or_a_dataset_that_does_not_fit_is_refused(
    dataset, two_camera_dataset, dense_checkpoint, grids_checkpoint, capsys
):
    arguments = ["validate", "--policy", str(grids_checkpoint), "--frames", "4", "--tokens", "4"]
    assert main([*arguments, "--dataset", str(dataset), "--teacher", str(grids_checkpoint)]) == 1
    assert "is a grids policy, but a teacher sees every token" in capsys.readouterr().err
    assert main([*arguments, "--dataset", str(two_camera_dataset)]) == 1
    assert "looks through cameras observation.image; the dataset has" in capsys.readouterr().err


def test_what_was_held_out_is_read_from_the_runs_options(tmp_path):
    assert held_out_share(str(tmp_path)) == 0.1
    (tmp_path / "fit.yaml").write_text("data:\n  val_fraction: 0.25\n")
    assert held_out_share(str(tmp_path)) == held_out_share(str(tmp_path / "pretrained_model")) == 0.25


def test_the_command_prints_draws_and_saves(dataset, dense_checkpoint, grids_checkpoint, tmp_path, capsys):
    result, picture = tmp_path / "a" / "result.json", tmp_path / "curve.png"
    arguments = ["validate", "--policy", str(grids_checkpoint), "--teacher", str(dense_checkpoint)]
    arguments += ["--num_steps", "3", "--dataset", str(dataset), "--by_task", "true"]
    arguments += ["--tokens", "4,16", "--frames", "8"]
    assert main([*arguments, "--json", str(result), "--picture", str(picture)]) == 0
    saved = json.loads(result.read_text())
    assert [row["num_tokens"] for row in saved["budgets"]] == [4, 16]
    assert saved["num_steps"] == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert all(text in printed for text in ("distance to teacher", "where 4 tokens look, by task"))
    assert sum(points["frames"] for points in saved["budgets"][1]["tasks"].values()) == saved["frames"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments[:-4], "--tokens", "dense"]) == 1
    assert "a budget is a number" in capsys.readouterr().err
    dense = ["validate", "--policy", str(dense_checkpoint), "--dataset", str(dataset), "--by_task", "true"]
    assert main(dense) == 1
    assert "has no points that move" in capsys.readouterr().err
