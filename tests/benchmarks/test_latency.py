"""benchmarks/latency.py answers what it cannot measure in one line."""

import sys

import pytest

import kept_results


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (["--family", "act", "--narrow"], "the 'act' family has none (all layers, few channels); measure it at"),
        (["--family", "pi1"], "'pi1' is not a known architecture; choose from act, "),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(asked, answer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["latency.py", *asked])
    with pytest.raises(SystemExit) as end:
        kept_results.load_script("latency").main()
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("latency.py: error: ")
    assert answer in line
