"""The data module against LeRobotDataset itself."""

import os
import signal

import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import default_collate

from lerobot_grids.data import LeRobotDataModule, load_metadata
from lerobot_grids.data.frame_cache import FrameCache
from lerobot_grids.data.frames import FrameError
from lerobot_grids.policies import start
from lerobot_policy_grids import TinySmolVLAConfig
from lerobot_policy_grids.errors import DatasetError


@pytest.fixture
def config():
    return TinySmolVLAConfig(device="cpu")


def test_cache_equals_the_collated_items(dataset, config):
    module = LeRobotDataModule(str(dataset))
    module.load(config)
    cache = module.train_dataset.dataset
    assert isinstance(cache, FrameCache)
    reference = LeRobotDataset(
        "local/squares",
        root=dataset,
        delta_timestamps={
            "action": [i / 10 for i in range(16)],
            "observation.image": [0.0],
            "observation.state": [0.0],
        },
        return_uint8=True,
    )
    indices = [0, 1, 23, 24, 40, 47, len(reference) - 1]  # starts and ends of episodes among them
    expected = default_collate([reference[i] for i in indices])
    got = cache.__getitems__(indices)
    assert got.keys() == expected.keys()
    got["observation.image"] = got["observation.image"].float() / 255  # kept as bytes until the device has them
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert got[key].dtype == value.dtype, key
            torch.testing.assert_close(got[key], value, msg=key)
        else:
            assert got[key] == value, key
    assert expected["action_is_pad"].any()


def test_an_uncached_loader_gives_the_same_validation_batches(dataset, config):
    batches = []
    for cache in ("auto", "never"):
        module = LeRobotDataModule(str(dataset), cache=cache, num_workers=0, batch_size=8)
        module.load(config)
        batches.append(next(iter(module.val_dataloader())))
    assert torch.equal(batches[0]["observation.image"].float() / 255, batches[1]["observation.image"])
    assert torch.equal(batches[0]["action"], batches[1]["action"])


def test_split_holds_out_whole_episodes_evenly(dataset):
    train, val = LeRobotDataModule(str(dataset), val_fraction=0.34).split()
    assert sorted(train + val) == list(range(6))
    assert val == [1, 4]


def test_every_split_leaves_an_episode_for_training(dataset):
    train, val = LeRobotDataModule(str(dataset), val_fraction=0.99).split()
    assert (len(train), len(val)) == (1, 5)
    assert LeRobotDataModule(str(dataset), val_fraction=0.99, episodes=[2]).split() == ([2], [])


def test_no_frame_is_in_both_splits(dataset, config):
    module = LeRobotDataModule(str(dataset), val_fraction=0.3)
    module.load(config)
    train, val = set(module.train_dataset.indices), set(module.val_dataset.indices)
    assert train.isdisjoint(val)
    assert len(train | val) == module.meta.total_frames


def test_no_validation_when_none_is_asked_for(dataset, config):
    module = LeRobotDataModule(str(dataset), val_fraction=0.0)
    module.load(config)
    assert module.split()[1] == []
    assert module.val_dataloader() == []


def test_validation_frames_are_capped_and_spread(dataset, config):
    module = LeRobotDataModule(str(dataset), val_fraction=0.5, max_val_frames=10)
    module.load(config)
    assert len(module.val_dataset) <= 10
    episodes = {i // 24 for i in module.val_dataset.indices}
    assert len(episodes) == 3


def test_missing_folder(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        load_metadata(str(tmp_path / "nothing"))


def test_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(DatasetError, match=r"no meta/info\.json"):
        load_metadata(str(tmp_path))


def test_damaged_metadata(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{ not json")
    with pytest.raises(DatasetError, match="cannot be read"):
        load_metadata(str(tmp_path))


def test_hub_id_without_a_network():
    with pytest.raises(DatasetError, match="someone/something cannot be fetched"):
        load_metadata("someone/something")


@pytest.mark.parametrize("lacking", ["camera", "action"])
def test_dataset_lacking_a_camera_or_an_action(lacking, tmp_path):
    features = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        "observation.image": {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
    }
    del features["observation.image" if lacking == "camera" else "action"]
    root = tmp_path / "dataset"
    data = LeRobotDataset.create("local/x", fps=10, features=features, root=root, use_videos=False)
    frame = {
        key: torch.zeros(feature["shape"]).numpy().astype("uint8" if feature["dtype"] == "image" else "float32")
        for key, feature in features.items()
    }
    for _ in range(3):
        data.add_frame(frame | {"task": "t"})
    data.save_episode()
    data.finalize()
    with pytest.raises(DatasetError, match={"camera": "has no colour camera", "action": "has no 'action'"}[lacking]):
        start("tiny", 16, load_metadata(str(root)))


@pytest.mark.parametrize("options", [{"cache": "maybe"}, {"val_fraction": 1.0}, {"val_fraction": -0.1}])
def test_impossible_options(dataset, options):
    with pytest.raises(DatasetError, match="choose"):
        LeRobotDataModule(str(dataset), **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_frame_that_cannot_be_read_is_named_in_one_line(dataset, config, workers, monkeypatch):
    module = LeRobotDataModule(str(dataset), cache="never", num_workers=workers, batch_size=4)
    module.load(config)
    monkeypatch.setattr(LeRobotDataset, "__getitem__", lambda self, index: 1 / 0)
    with pytest.raises(FrameError, match=r"^frame \d+ of dataset local/.* cannot be read: division by zero; repair it"):
        next(iter(module.train_dataloader()))


def test_ctrl_c_does_not_stop_the_processes_that_load(dataset, config):
    """A terminal sends it to them, too; the step that is being done needs its frames."""
    module = LeRobotDataModule(str(dataset), cache="never", num_workers=1, batch_size=4)
    module.load(config)
    batches = iter(module.val_dataloader())
    next(batches)
    (worker,) = batches._workers
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == len(module.val_dataloader()) - 1
    assert worker.is_alive()
    batches._shutdown_workers()
