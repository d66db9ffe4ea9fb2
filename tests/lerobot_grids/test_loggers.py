"""Where curves go: nothing is written before the first value, and what is missing is said at once."""

import sys
from types import SimpleNamespace

import pytest

from lerobot_grids import choices
from lerobot_grids.training.loggers import LazyWandbLogger, TrackioLogger, make_loggers
from lerobot_policy_grids.errors import GridsError


@pytest.fixture
def wandb(monkeypatch):
    """Weights & Biases' client, logged in or not; what it was started with is kept."""
    started = []
    fake = SimpleNamespace(api=SimpleNamespace(api_key=None), run=None, init=lambda **options: started.append(options))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(choices, "find_spec", lambda name: None)
    assert choices.logger_fault("csv,tensorboard") is None
    assert choices.logger_fault("csv,trackio").endswith("pip install trackio")
    assert "choose from csv" in choices.logger_fault(",")


def test_a_resumed_part_gets_its_own_csv(tmp_path):
    (tmp_path / "logs" / "csv").mkdir(parents=True)
    csv, tensorboard = make_loggers(["csv", "tensorboard"], tmp_path)
    assert (csv.version, tensorboard.version) == ("csv-2", "tensorboard")


def test_wandb_without_a_login(wandb, tmp_path, monkeypatch):
    with pytest.raises(GridsError, match="wandb login, or log without a network with WANDB_MODE=offline"):
        make_loggers(["wandb"], tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    pytest.importorskip("lightning")
    monkeypatch.setattr(LazyWandbLogger, "__init__", lambda self, **options: vars(self).update(options))
    (logger,) = make_loggers(["wandb"], tmp_path / "run")
    options = {"name": "run", "project": "lerobot-grids", "save_dir": tmp_path / "run" / "logs"}
    assert options.items() <= vars(logger).items()
    assert not (tmp_path / "run").exists()


def test_trackio(monkeypatch):
    """Its functions as release 0.43 has them."""
    calls = []

    def init(project, name=None, *, config=None, resume="never"):
        calls.append(("init", project, name, config, resume))
        return "run"

    fake = SimpleNamespace(
        init=init,
        log=lambda metrics, step=None: calls.append(("log", metrics, step)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    logger = TrackioLogger("grids16")
    logger.finalize("success")
    assert calls == []
    logger.log_hyperparams({"lr": 0.1, "policy": None})
    logger.log_metrics({"train/loss": 1}, step=3)
    logger.log_metrics({"val/loss": 2.0}, step=4)
    logger.finalize("success")
    logger.finalize("success")
    assert calls == [
        ("init", "lerobot-grids", "grids16", {"lr": 0.1, "policy": "None"}, "allow"),
        ("log", {"train/loss": 1.0}, 3),
        ("log", {"val/loss": 2.0}, 4),
        ("finish",),
    ]
