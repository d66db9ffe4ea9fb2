"""The comparison with the paper's repository, on a made clone with modules of the same names."""

import sys

import pytest

import kept_results

# The formula by torch's functions, in the two modules' orders of axes.
MODULE = """
import torch
from torch import nn

class {name}(nn.Module):
    def __init__(self, width, count):
        super().__init__()
        self.scout_mlp = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 2 * count), nn.Sigmoid())
        self.coord_encoder = nn.Sequential(nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, width))

    def forward(self, maps):
        maps = maps.permute({axes})
        points = self.scout_mlp(maps.mean((2, 3))).unflatten(1, (-1, 2))
        read = nn.functional.grid_sample(maps, 2 * points[:, None] - 1, align_corners={corners})
        tokens = read[:, :, 0].transpose(1, 2) + self.coord_encoder(points)
        return {result}
"""


@pytest.fixture
def script():
    return kept_results.load_script("reference")


def run(script, clone, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reference.py", str(clone)])
    return script.main()


def test_each_module_has_a_line_and_a_difference_is_an_error(script, tmp_path, monkeypatch, capsys):
    lerobot, openpi, example = (tmp_path / name for name in script.MODULES)
    for path in (lerobot, openpi, example):
        path.parent.mkdir(parents=True)
    axes = {"name": "ActiveTokenSampler", "axes": "0, 1, 2, 3", "result": "tokens"}
    lerobot.write_text(MODULE.format(**axes, corners=False))
    openpi.write_text("import a_package_that_nobody_has")
    for corners, status in ((True, 0), (False, 1)):
        axes = {"name": "ActiveTokenSamplerTorch", "axes": "0, 3, 1, 2", "result": "tokens, points"}
        example.write_text(MODULE.format(**axes, corners=corners))
        # Python would run the file of a moment ago again.
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        assert run(script, tmp_path, monkeypatch) == status
        _, first, second, third = capsys.readouterr().out.splitlines()
        assert "convention lerobot, difference 0.0e+00, largest entry" in first
        assert second.endswith("left out, No module named 'a_package_that_nobody_has'")
        assert "convention openpi, difference" in third


def test_a_folder_that_is_no_clone_is_named(script, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(script, tmp_path, monkeypatch)
    assert "active_token_sampler.py; give a clone" in capsys.readouterr().err
