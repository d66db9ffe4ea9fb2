"""A recording that is stopped keeps what it has finished, whole."""

import json
import signal
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_grids.simulation import environments, recording
from lerobot_grids.simulation.demonstrations import Demonstration, vector_feature
from lerobot_grids.simulation.recording import record
from lerobot_grids_cli.main import main


@pytest.fixture(autouse=True)
def interruptible():
    """What a shell starts in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@dataclass
class Still:
    """A demonstrator without a simulator, whose episodes are made in this process."""

    tasks = ("push",)
    fps, robot_type = 10, "still"
    features: ClassVar = {"action": vector_feature(["a"]), "observation.state": vector_feature(["a"])}

    def episodes(self, *args):
        for number in range(4):
            values = np.full((5, 1), number, np.float32)
            yield Demonstration("push", {"action": values, "observation.state": values})


@pytest.fixture
def still(monkeypatch):
    demonstrator = Still()
    monkeypatch.setattr(recording, "demonstrations", demonstrator.episodes)
    return demonstrator


def kept(output):
    """The numbers of the episodes of a recording, one for each frame."""
    dataset = LeRobotDataset("local/demos", root=output)
    assert dataset.meta.total_frames == len(dataset) == dataset.meta.total_episodes * 5
    return [int(dataset[place]["action"]) for place in range(len(dataset))]


def test_a_recording_that_is_stopped_keeps_its_finished_episodes(still, tmp_path):
    seen = []

    def stop(episode):
        seen.append(episode)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)

    recorded = record(tmp_path / "demos", still, episodes=4, on_episode=stop)
    assert (recorded.episodes, recorded.frames, type(recorded.stopped)) == (2, 10, KeyboardInterrupt)
    assert kept(tmp_path / "demos") == [0] * 5 + [1] * 5
    assert [path.name for path in tmp_path.iterdir()] == ["demos"]


def test_an_episode_that_is_being_saved_is_saved_whole(still, tmp_path, monkeypatch):
    save = LeRobotDataset.save_episode

    def pressed(dataset, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        save(dataset, *args, **kwargs)

    monkeypatch.setattr(LeRobotDataset, "save_episode", pressed)
    recorded = record(tmp_path / "demos", still, episodes=4)
    assert (recorded.episodes, type(recorded.stopped)) == (1, KeyboardInterrupt)
    assert kept(tmp_path / "demos") == [0] * 5


def test_a_recording_without_a_finished_episode_leaves_nothing(still, tmp_path, monkeypatch):
    def pressed(dataset, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(LeRobotDataset, "add_frame", pressed)
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "demos", still, episodes=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_record_says_what_it_kept(number, code, still, tmp_path, monkeypatch, capsys):
    save = LeRobotDataset.save_episode

    def pressed(dataset, *args, **kwargs):
        save(dataset, *args, **kwargs)
        signal.raise_signal(number)

    monkeypatch.setattr(LeRobotDataset, "save_episode", pressed)
    monkeypatch.setattr(environments, "make_demonstrator", lambda *args, **kwargs: still)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        main(["record", f"--output={tmp_path / 'demos'}", "--episodes=4", f"--json={tmp_path / 'r.json'}"])
    signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert "stopped after 1 of 4 episodes, which are kept as a dataset" in line
    assert json.loads((tmp_path / "r.json").read_text())["episodes"] == 1
