"""The kept results say what docs/results.md prints, and the runner does each thing once."""

import json
import shutil
import sys

import pytest
import yaml

from kept_results import BENCHMARKS, load_script, results

sys.modules["results"] = results
study = load_script("study")

STUDIES = sorted((BENCHMARKS / "studies").glob("*.yaml"))
RESULTS = sorted((BENCHMARKS / "results").glob("*.jsonl"))
MAIN = {
    "dense": "1126/1200",
    "grids16": "1104/1200",
    "grids4": "1086/1200",
    "mean24": "1101/1200",
    "mean16": "1103/1200",
    "mean4": "1097/1200",
    "mean1": "995/1200",
    "uniform16": "1086/1200",
    "pool16": "1105/1200",
    "random16": "998/1200",
    "tome16": "1075/1200",
    "fastv16": "1078/1200",
    "sparsevlm16": "1098/1200",
    "half-resolution": "1072/1200",
    "blind": "109/1200",
}
# Stands for lerobot-grids: writes what each command leaves, with the options that it was given.
FAKE = """
import json, sys
from pathlib import Path
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
output = Path(options["--output"])
output.mkdir(parents=True, exist_ok=True)
with open("calls", "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "fit" and Path("broken").exists():
    sys.exit("out of memory")
if sys.argv[1] == "eval":
    task = {"task": "push-v3", "seconds": 1.5, "seeds": [7, 8, 9]}
    task["outcomes"] = [True, False, "b" in options["--policy"]]
    result = {"policy": options["--policy"], "policy_type": "grids", "num_tokens": 4, "num_dense_tokens": 9}
    (output / "result.json").write_text(json.dumps(result | {"tasks": [task]}))
"""


def table_of(path):
    header, *rows = results.table(results.read(path))
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_prints_its_commands(path, tmp_path, capsys):
    assert study.main([path.stem, "--dry-run", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    content = yaml.safe_load(path.read_text())
    assert said[:2] == [f"# {content['question']}", f"cd {tmp_path}"]
    assert len(said) > 2
    for name in content.get("methods", {}):
        assert any(name in line for line in said[2:])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_line_is_a_measurement_of_its_own(path):
    lines = results.read(path)
    assert len({results.key(line) for line in lines}) == len(lines) > 0
    for line in (line for line in lines if line["kind"] == "evaluation"):
        seeds = results.episode_seeds(line)
        assert all(len(bits) == len(seeds) and set(bits) <= {"0", "1"} for bits in line["outcomes"].values())
        assert set(line["seconds"]) == set(line["outcomes"])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_kept_results_are_of_the_methods_of_the_study(path):
    kept = {
        line["method"] for line in results.read(BENCHMARKS / "results" / f"{path.stem}.jsonl") if "outcomes" in line
    }
    methods = set(yaml.safe_load(path.read_text()).get("methods", {}))
    assert kept <= methods
    if kept:
        # An elastic policy was not evaluated at 16 tokens after 600 steps.
        assert methods - kept <= {"elastic16-task-600-steps"}


def test_the_main_table():
    rows = table_of(BENCHMARKS / "results" / "main.jsonl")
    assert {name: row["all"] for name, row in rows.items()} == MAIN
    assert rows["mean16"]["against dense, points"] == "-1.9 (-3.9 to +0.1)"
    assert (rows["mean16"]["GFLOPs"], rows["mean16"]["ms"], rows["mean16"]["95 %"]) == (
        "0.184",
        "7.8",
        "89 \u2013 94",
    )


def test_a_line_is_replaced_by_the_same_measurement(tmp_path):
    file, line = tmp_path / "x.jsonl", {"kind": "evaluation", "method": "a", "seed": 0, "tokens": 4}
    results.put(file, [line | {"outcomes": {"t": "1"}}, line | {"seed": 1}])
    results.put(file, [line | {"outcomes": {"t": "0"}}])
    assert [(x["seed"], x.get("outcomes")) for x in results.read(file)] == [(0, {"t": "0"}), (1, None)]


@pytest.fixture
def small(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    content = {"question": "?", "program": f"python {tmp_path / 'fake.py'}", "base": "b", "record": "--size 8"}
    content |= {"fit": "--steps 3", "seeds": [0, 1], "methods": {"a": "--tokens 4", "b": "--tokens 2"}, "eval": "--x 1"}
    content["methods"]["a2"] = {"of": "a", "at": {"tokens": 2}}

    def run(*more, **changes):
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(content | changes, sort_keys=False))
        study.main([str(tmp_path / "small.yaml"), "--output", str(tmp_path / "out"), *more])
        calls = (tmp_path / "out" / "calls").read_text().splitlines()
        (tmp_path / "out" / "calls").write_text("")
        return [call.split()[0] for call in calls]

    run.output = tmp_path / "out"
    return run


def test_a_study_runs_once_and_goes_on(small):
    assert sorted(small()) == ["eval"] * 6 + ["fit"] * 4 + ["record"]
    lines = results.read(small.output / "small.jsonl")
    assert [(x["method"], x["seed"]) for x in lines] == [(m, s) for m in ("a", "b", "a2") for s in (0, 1)]
    assert lines[2]["outcomes"] == {"push-v3": "101"}
    assert lines[2]["episode_seeds"] == {"first": 7, "count": 3}
    assert small() == []
    assert small(eval="--x 2") == ["eval"] * 6
    shutil.rmtree(small.output / "b-s1")
    (small.output / "done" / "b-s1").unlink()
    assert small(eval="--x 2") == ["fit", "eval"]


def test_a_teacher_of_the_study_is_trained_before_its_students(small):
    methods = {"student": "--teacher {dense}", "dense": "--tokens dense", "other": "--tokens 2"}
    assert small("--only", "student", methods=methods) == ["record", *["fit"] * 4, *["eval"] * 2]
    begun = {path.name: path for path in (small.output / "begun").iterdir()}
    for seed in ("s0", "s1"):
        assert f"--teacher dense-{seed}" in begun[f"student-{seed}"].read_text()
        assert begun[f"dense-{seed}"].stat().st_mtime_ns < begun["student-s0"].stat().st_mtime_ns


def test_an_unknown_teacher_is_refused(small):
    with pytest.raises(SystemExit, match=r"method student needs dense; this study has student"):
        small(methods={"student": "--teacher {dense}"})


def test_another_recipe_is_refused(small):
    small()
    with pytest.raises(SystemExit, match=r"(?s)--steps 3.*and not by.*--steps 4"):
        small(fit="--steps 4")


def test_what_is_not_ours_is_not_removed(small):
    (small.output / "demonstrations").mkdir(parents=True)
    with pytest.raises(SystemExit, match="not made by this study"):
        small()


def test_a_failure_shows_the_end_of_its_log_and_a_half_done_run_is_resumed(small):
    small.output.mkdir()
    (small.output / "broken").touch()
    with pytest.raises(SystemExit, match="out of memory"):
        small("--workers", "1", "--only", "a", "--seeds", "0")
    (small.output / "broken").unlink()
    (small.output / "calls").unlink()
    state = small.output / "a-s0" / study.STATE
    state.parent.mkdir(parents=True)
    state.touch()
    small("--only", "a", "--seeds", "0")
    assert state.is_file()
    assert json.loads((small.output / "small.jsonl").read_text())["method"] == "a"
