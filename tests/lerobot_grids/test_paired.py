"""Policies side by side on the same episodes."""

import json
import math
from functools import partial

import numpy as np
import pytest

from lerobot_grids.evaluation import paired as paired_module
from lerobot_grids.evaluation.paired import Method, compare
from lerobot_grids.evaluation.statistics import paired_comparison, wilson_interval
from lerobot_grids.evaluation.success import Evaluation, summarise
from lerobot_grids.evaluation.tables import draw_methods, markdown
from lerobot_grids.policies import load
from lerobot_grids.simulation.environments import make_env_config
from lerobot_policy_grids.errors import CheckpointError, GridsError

SHORT = partial(make_env_config, "metaworld", "push-v3", {"max_steps": 16})


def test_mcnemar_is_the_exact_binomial():
    # 8 wins, 1 loss: two-sided 2 * (1 + 9) / 512.
    ours = [True] * 8 + [False] + [True] * 5 + [False] * 6
    theirs = [False] * 8 + [True] + [True] * 5 + [False] * 6
    paired = paired_comparison([ours], [theirs])
    assert (paired.wins, paired.losses) == (8, 1)
    assert paired.difference == pytest.approx(7 / 20)
    assert paired.p == pytest.approx(20 / 512)
    # Agresti and Min: (8.5 - 1.5) / 22, with its standard error.
    half = 1.959964 * math.sqrt(10 - 49 / 22) / 22
    assert paired.interval == pytest.approx((7 / 22 - half, 7 / 22 + half))


def test_equal_outcomes_differ_by_nothing():
    paired = paired_comparison([[True, False, True]], [[True, False, True]])
    assert (paired.difference, paired.p) == (0.0, 1.0)
    assert paired.interval[0] < 0 < paired.interval[1]
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_comparison([[True]], [[True, False]])


def test_repetitions_of_the_same_episodes_make_nothing_surer():
    random = np.random.default_rng(1)
    theirs = (random.random(60) < 0.7).tolist()
    ours = [not outcome if random.random() < 0.2 else outcome for outcome in theirs]
    one, three = paired_comparison([ours], [theirs]), paired_comparison([ours] * 3, [theirs] * 3)
    assert three.difference == pytest.approx(one.difference)
    assert (three.wins, three.losses) == (3 * one.wins, 3 * one.losses)
    widths = [interval[1] - interval[0] for interval in (one.interval, three.interval)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)
    assert three.p == pytest.approx(one.p, abs=0.05)


def test_several_seeds_that_agree_on_the_direction_are_surer_than_one():
    random = np.random.default_rng(2)
    theirs = [(random.random(100) < 0.6).tolist() for _ in range(3)]
    ours = [(random.random(100) < 0.8).tolist() for _ in range(3)]
    together = paired_comparison(ours, theirs)
    assert together.p < 0.01
    assert together.interval[0] > 0
    assert together.difference == pytest.approx(np.mean(ours) - np.mean(theirs))


def test_seeds_are_paired_with_the_references_seeds():
    def run(*outcomes):
        evaluation = Evaluation("", "grids", 16, 144)
        evaluation.tasks.append(summarise("push", list(outcomes), [7, 8], 1.0))
        return evaluation

    reference = [run(True, False), run(False, False)]
    row = paired_module._summarise("ours", [run(True, True), run(False, True)], reference)
    assert (row.paired.wins, row.paired.losses) == (2, 0)
    assert row.by_seed == [1.0, 0.5]
    assert row.by_task == {"push": (3, 4)}
    # Two episodes, met twice.
    assert row.interval == wilson_interval(1.5, 2)
    moved = run(True, True)
    moved.tasks[0].seeds = [9, 10]
    with pytest.raises(GridsError, match="first method's episodes"):
        paired_module._summarise("ours", [moved, moved], reference)


@pytest.fixture(scope="module")
def compared(dense_checkpoint, grids_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    methods = {
        "dense": Method([str(dense_checkpoint)]),
        "grids": Method([str(grids_checkpoint)], tokens=9),
        "pool": Method([str(dense_checkpoint)], tokens=16, reducer="pool"),
        "small": Method([str(dense_checkpoint)], resolution=48),
    }
    return folder, methods, compare(methods, SHORT, folder, episodes=2, batch_size=2)


def test_methods_are_run_and_measured(compared, tmp_path):
    folder, _, result = compared
    assert [row.num_tokens for row in result.methods] == [144, 9, 16, 36]
    assert [row.episodes for row in result.methods] == [2, 2, 2, 2]
    dense, *others = result.methods
    assert all(row.gflops < dense.gflops and row.latency_ms > 0 for row in others)
    assert result.methods[0].paired is None
    assert (folder / "grids-0.json").is_file()
    table = markdown(result).splitlines()
    assert len(table) == 6
    assert len({line.count("|") for line in table}) == 1
    draw_methods(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_what_is_there_is_not_run_again(compared, monkeypatch):
    folder, methods, result = compared
    seen = []
    monkeypatch.setattr(paired_module, "evaluate", lambda *args, **kwargs: pytest.fail("ran again"))
    again = compare(
        methods, SHORT, folder, episodes=2, batch_size=2, costs=False, on_evaluation=lambda *it: seen.append(it)
    )
    assert [row.successes for row in again.methods] == [row.successes for row in result.methods]
    assert seen == [("dense", 2), ("grids", 2), ("pool", 2), ("small", 2)]


def test_what_is_there_must_be_the_same(compared):
    folder, methods, _ = compared
    with pytest.raises(GridsError, match="evaluated with episodes=2, now 3"):
        compare(methods, SHORT, folder, episodes=3, batch_size=2)
    changed = methods | {"pool": Method(methods["pool"].policies, tokens=4, reducer="pool")}
    with pytest.raises(GridsError, match="evaluated with tokens=16, now 4"):
        compare(changed, SHORT, folder, episodes=2, batch_size=2)
    with pytest.raises(GridsError, match="evaluated with perturb=None, now light:1"):
        compare(methods, SHORT, folder, episodes=2, batch_size=2, protocol={"perturb": "light:1"})
    path = folder / "dense-0.json"
    kept = json.loads(path.read_text())
    try:
        # An option that was given then and is left out now.
        path.write_text(json.dumps(kept | {"asked": kept["asked"] | {"max_steps": 16}}))
        with pytest.raises(GridsError, match="evaluated with max_steps=16, now None"):
            compare(methods, SHORT, folder, episodes=2, batch_size=2)
        # The same folder, trained again.
        path.write_text(json.dumps(kept | {"asked": kept["asked"] | {"weights": "0123"}}))
        with pytest.raises(GridsError, match="evaluated with weights=0123"):
            compare(methods, SHORT, folder, episodes=2, batch_size=2)
    finally:
        path.write_text(json.dumps(kept))


def test_mistakes_are_found_before_anything_runs(compared, tmp_path, monkeypatch):
    _, methods, _ = compared
    monkeypatch.setattr(paired_module, "evaluate", lambda *args, **kwargs: pytest.fail("ran"))
    with pytest.raises(CheckpointError, match="nowhere"):
        compare(methods | {"last": Method(["nowhere/at/all"])}, SHORT, tmp_path, episodes=2)
    with pytest.raises(GridsError, match=r"unequal numbers of checkpoints \(dense 1, .*twice 2\)"):
        compare(methods | {"twice": Method(methods["dense"].policies * 2)}, SHORT, tmp_path, episodes=2)
    for policies in ("tiny_metaworld", []):
        with pytest.raises(GridsError, match="give a list of checkpoints"):
            Method(policies)


def test_a_damaged_result_is_named(compared, tmp_path):
    _, methods, _ = compared
    (tmp_path / "dense-0.json").write_text(json.dumps({"policy": "x"}))
    with pytest.raises(GridsError, match=r"dense-0\.json cannot be read"):
        compare(methods, SHORT, tmp_path, episodes=2)


def test_two_processes_find_what_one_finds(compared, tmp_path):
    _, methods, one = compared
    methods = {name: methods[name] for name in ("dense", "pool")}
    found = compare(methods, SHORT, tmp_path, episodes=2, batch_size=2, costs=False, workers=2)
    expected = {row.name: row.by_task for row in one.methods}
    assert {row.name: row.by_task for row in found.methods} == {name: expected[name] for name in methods}


def test_reducing_without_training_is_for_dense_policies(grids_checkpoint, dense_checkpoint):
    with pytest.raises(CheckpointError, match="was trained with reducer 'grids'; drop --reducer"):
        load(str(grids_checkpoint), reducer="pool")
    with pytest.raises(GridsError, match="drop --resolution"):
        load(str(grids_checkpoint), resolution=48)
    with pytest.raises(CheckpointError, match="--reducer how its tokens should be reduced"):
        load(str(dense_checkpoint), num_tokens=16)
    assert load(str(dense_checkpoint), reducer="fastv").policy.num_tokens == 16
    for side in (0, 50):
        with pytest.raises(GridsError, match=r"50 x 50 pixels|--resolution 0"):
            load(str(dense_checkpoint), resolution=side)
