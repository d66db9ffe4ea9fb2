"""benchmarks/latency.py times what it says, keeps what it measured, and answers in one line what it cannot measure."""

import argparse
import json
import sys

import pytest
import torch

import kept_results
from lerobot_policy_grids import compress
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.runtime import fast, quantised

latency = kept_results.load_script("latency")
OPTIONS = {"family": "tiny", "cameras": 1, "dtype": "float32", "device": "cpu", "narrow": False, "padded": None}
OPTIONS |= {"words": 16, "warmup": 1, "repeats": 3, "clock": "cpu", "json": None}
TINY = ["--family", "tiny", "--cameras", "1", "--dtype", "float32", "--device", "cpu"]


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (["--family", "act", "--narrow"], "the 'act' family has none (all layers, few channels); measure it at"),
        (["--family", "pi1"], "'pi1' is not a known architecture; choose from act, "),
        ([*TINY, "--tokens", "500"], "500 tokens per camera requested, but the dense policy has 12 x 12 = 144"),
        ([*TINY, "--peak_tflops", "10"], "give both --peak_tflops and --bandwidth_gbs"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(asked, answer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latency.py", *asked])
    with pytest.raises(SystemExit) as end:
        latency.main()
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("latency.py: error: ")
    assert answer in line


@pytest.fixture
def dense():
    policy = latency.build(argparse.Namespace(**OPTIONS))
    policy.config.num_steps = 2
    return policy


def rows_of(policy, **options):
    return latency.Rows(policy, argparse.Namespace(**OPTIONS | options), {}, None)


class Backend:
    """Compiles nothing, and counts how often each graph runs."""

    def __init__(self):
        self.runs = []

    def __call__(self, graph, inputs):
        number = len(self.runs)
        self.runs.append(0)

        def run(*args):
            self.runs[number] += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend(monkeypatch):
    """In the place of Inductor."""
    own, backend = torch.compile, Backend()

    def compiled(function, mode=None, **options):
        return own(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compiled)
    yield backend
    torch._dynamo.reset()


def test_compiled_code_runs_in_each_repetition(dense, backend):
    """Counting comes afterwards, because torch never goes back to compiled code of which it skipped the frame once."""
    rows, chunks = rows_of(dense), 1 + OPTIONS["repeats"]
    policy = compress(dense, 16)
    expected = rows.add(latency.Row(16), policy)
    rows.add(latency.Row(16, None, "compiled"), policy, expected)
    eager, compiled = rows.rows
    assert compiled.refused is None
    # The second graph runs in each step.
    assert backend.runs == [chunks, 2 * chunks]
    assert (eager.graphs, compiled.graphs) == (None, 2)
    assert (eager.operations > 400, compiled.operations) == (True, None)
    assert compiled.difference < 1e-6
    assert sum(eager.work["steps"].flops.values()) > sum(compiled.work["steps"].flops.values()) > 0


def test_the_loop_that_lerobot_compiles_runs_in_each_repetition(backend):
    model = torch.nn.Module()
    model.sample_actions = own = torch.sin
    policy = argparse.Namespace(config=argparse.Namespace(type="pi0", compile_mode="max-autotune"), model=model)
    row, x = latency.Row(runtime="compiled"), torch.ones(3)
    with latency.compiled_by_lerobot(policy):
        latency.time_chunks(row, policy, lambda: model.sample_actions(x), argparse.Namespace(**OPTIONS))
    assert backend.runs == [1 + OPTIONS["repeats"]]
    assert (row.graphs, len(row.seconds["total"])) == (1, OPTIONS["repeats"])
    assert model.sample_actions is own


def test_on_a_gpu_each_repetition_is_two_runs_after_three(backend, monkeypatch):
    """And its memory is that of this row alone."""
    said = []
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: said.append((name, device)) or 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: said.append("empty_cache"))
    row, x, double = latency.Row(runtime="compiled"), torch.ones(3), torch.compile(lambda x: x + x)
    options = argparse.Namespace(**OPTIONS | {"device": "cuda:1", "warmup": None, "repeats": 2})
    latency.time_chunks(row, None, lambda: double(x), options)
    assert backend.runs == [3 + 2 * 2]
    waits = 2 * 2 * 2 * [("synchronize", "cuda:1")]
    peak = [("max_memory_allocated", "cuda:1")]
    assert said == ["empty_cache", ("reset_peak_memory_stats", "cuda:1"), *waits, *peak]
    assert row.peak_memory_mib == 3


def test_what_cannot_be_counted_keeps_its_times(dense, monkeypatch, capsys):
    def fail(*args):
        raise ValueError("no rule")

    monkeypatch.setattr(latency, "count", fail)
    rows = rows_of(dense)
    assert rows.add(latency.Row(), dense) is not None
    (row,) = rows.rows
    assert (len(row.seconds["total"]), row.refused, row.operations) == (OPTIONS["repeats"], None, None)
    assert "not counted: ValueError: no rule" in capsys.readouterr().out


def test_eager_code_is_not_called_compiled(dense, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    rows = rows_of(dense)
    assert rows.add(latency.Row(runtime="compiled"), dense, acting=latency.compiled_by_lerobot(dense)) is None
    assert "LeRobot dense compiled   refused: torch.compile made no graph" in capsys.readouterr().out
    assert not rows.rows[0].seconds


def test_what_lerobot_does_not_compile_is_said():
    policy = argparse.Namespace(config=argparse.Namespace(type="act"), model=torch.nn.Module())
    with (
        pytest.raises(GridsError, match="LeRobot has no compile_model for a 'act' policy"),
        latency.compiled_by_lerobot(policy),
    ):
        pass


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs the command, and returns its exit status and the rows that it wrote."""
    file = tmp_path / "rows.jsonl"

    def run(*arguments):
        words = ["latency.py", *TINY, "--repeats", "1", "--json", str(file), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        status = latency.main()
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert all(line["family"] == "tiny" and len(line["rows"]) == 1 for line in lines)
        return status, {line["name"]: line["rows"][0] for line in lines}

    run.file = file
    return run


def test_what_is_refused_is_a_row_and_the_rest_goes_on(measured, monkeypatch, capsys):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    status, rows = measured("--quantise", "int8", "--sample_after_layer", "5")
    assert status == 0
    assert "needs torchao" in rows["K=16 fast int8"]["refused"]
    assert "the vision tower has 1 layers" in rows["K=16 L=5"]["refused"]
    good = {name: row for name, row in rows.items() if row["refused"] is None}
    assert set(good) == {"LeRobot dense", "K=144 fast", "K=16", "K=16 fast"}
    assert good["K=144 fast"]["difference"] < 1e-4
    for row in good.values():
        assert len(row["seconds"]["total"]) == 1
        assert row["seconds"]["prefill"][0] + row["seconds"]["steps"][0] == pytest.approx(row["seconds"]["total"][0])
        assert row["bound_seconds"] == {}
    assert (rows["K=16 L=5"]["layer"], good["K=16 fast"]["runtime"], good["K=16"]["runtime"]) == (5, "fast", "eager")
    said = capsys.readouterr().out
    assert "K=16 L=5                 refused: " in said
    assert "no bound: the peaks of this device are not in the table" in said


def test_a_fast_path_beyond_its_bound_is_refused(measured, monkeypatch):
    monkeypatch.setitem(fast.BOUNDS, torch.float32, -1.0)
    status, rows = measured("--peak_tflops", "0.1", "--bandwidth_gbs", "20")
    assert status == 0
    for name in ("K=144 fast", "K=16 fast"):
        assert rows[name]["refused"].startswith("its first action chunk differs by ")
    dense = rows["LeRobot dense"]
    for stage, work in dense["work"].items():
        slower = max(work["flops"]["float32"] / 1e11, work["weight_bytes"] / 2e10)
        assert dense["bound_seconds"][stage] == pytest.approx(slower)


def test_each_row_is_written_when_it_is_measured(measured, monkeypatch):
    """Whatever ends the command afterwards."""
    count, calls = latency.count, []

    def stop_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        count(*args)

    monkeypatch.setattr(latency, "count", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        measured()
    (line,) = measured.file.read_text().splitlines()
    assert json.loads(line)["name"] == "LeRobot dense"


def test_a_third_of_the_layers_is_the_default_inside_the_tower(dense):
    assert latency.layers_of(dense) == [0]


def test_rows_written_one_by_one_are_drawn_together(monkeypatch):
    monkeypatch.syspath_prepend(kept_results.BENCHMARKS)
    stages = kept_results.load_script("stages")
    header = {"kind": "latency", "family": "pi0", "tokens": 16}
    rows = [{"name": "LeRobot dense"}, {"name": "K=16", "refused": "why"}, {"name": "K=16 fast", "refused": None}]
    lines = [header | {"name": row["name"], "rows": [row]} for row in rows]
    (line,) = stages.together([*lines])
    assert [row["name"] for row in line["rows"]] == ["LeRobot dense", "K=16 fast"]
    assert len(stages.together([*lines, header | {"tokens": 4, "rows": []}])) == 2
