"""What a preflight finds, each with the smallest dataset or configuration that has it."""

import shutil
from collections import namedtuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

from lerobot_grids.console import report
from lerobot_grids.data import LeRobotDataModule, load_metadata
from lerobot_grids.policies import start
from lerobot_grids.preflight import Finding, disk, refuse_errors
from lerobot_grids.preflight.episodes import check_episodes
from lerobot_grids.preflight.features import read_features
from lerobot_grids.preflight.findings import PreflightError
from lerobot_grids.preflight.robot import check_acting, check_training
from lerobot_policy_grids import TinySmolVLAConfig
from lerobot_policy_grids.errors import DatasetError
from recordings import dataset_of


@pytest.fixture
def meta(tmp_path):
    return load_metadata(str(dataset_of(tmp_path / "data")))


def lines(findings, is_error=True):
    return [finding.line for finding in findings if finding.is_error == is_error]


def change_column(root, name, change):
    """Replace a column of a dataset's only data file."""
    (path,) = root.glob("data/**/*.parquet")
    table = pq.read_table(path)
    at = table.column_names.index(name)
    values = pa.array(change(table[name].to_pylist()), type=table.schema.field(at).type)
    pq.write_table(table.set_column(at, table.schema.field(at), values), path)


def config_like(meta, **changes):
    """A configuration that was trained on a dataset."""
    data = read_features(meta)
    config = TinySmolVLAConfig(device="cpu", input_features=data.inputs, output_features=data.outputs)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_errors_are_raised_together_and_warnings_are_printed(capsys):
    findings = [Finding("first"), Finding("beware", is_error=False), Finding("second")]
    with pytest.raises(PreflightError) as raised:
        report(findings)
    assert raised.value.lines == ["first", "second"]
    assert capsys.readouterr().err == "lerobot-grids: warning: beware\n"
    refuse_errors([Finding("beware", is_error=False)])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "action",
            lambda v: [*v[:3], [float("inf")] * 4, *v[4:]],
            "NaN or infinity in 1 frames, first in frame 3 of ep",
        ),
        ("index", lambda v: [v[1], v[0], *v[2:4], 9, 5], "'index' is not what its list of episodes says"),
        ("frame_index", lambda v: [0, *v[:-1]], "'frame_index' is not what its list of episodes says"),
    ],
)
def test_numbers_that_are_wrong(tmp_path, name, change, message):
    root = dataset_of(tmp_path / "data")
    change_column(root, name, change)
    with pytest.raises(DatasetError, match=message):
        LeRobotDataModule(str(root))


def test_a_damaged_or_short_data_file(tmp_path):
    root = dataset_of(tmp_path / "data")
    (path,) = root.glob("data/**/*.parquet")
    pq.write_table(pq.read_table(path).slice(0, 4), path)
    with pytest.raises(DatasetError, match="hold 4 frames, its metadata says 6"):
        LeRobotDataModule(str(root))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DatasetError, match="data files cannot be read"):
        LeRobotDataModule(str(root))


def test_an_episode_with_a_nan_can_be_left_out(dataset, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    change_column(root, "observation.state", lambda v: [[float("nan")] * 4, *v[1:]])
    with pytest.raises(DatasetError, match=r"leave the episode out with fit --data\.episodes"):
        LeRobotDataModule(str(root))
    data = LeRobotDataModule(str(root), episodes=[1, 2, 4], val_fraction=0.34)
    assert data.split() == ([1, 4], [2])
    with pytest.raises(DatasetError, match=r"the dataset has the episodes 0 \.\. 5"):
        LeRobotDataModule(str(root), episodes=[6])


def test_statistics_of_other_data_are_a_warning(tmp_path):
    root = dataset_of(tmp_path / "data")
    assert not lines(LeRobotDataModule(str(root)).findings, is_error=False)
    change_column(root, "action", lambda v: [list(row + 3) for row in np.random.default_rng(0).normal(size=(6, 4))])
    (line,) = lines(LeRobotDataModule(str(root)).findings, is_error=False)
    assert "statistics of 'action' are not those of its data" in line


def test_short_episodes_are_a_warning(meta):
    assert "1 of 1 episodes are shorter than the action chunk of 16" in check_episodes(config_like(meta), meta)[0].line
    assert not check_episodes(config_like(meta, chunk_size=6), meta)


def test_joints_in_another_order_are_not_compared(meta):
    meta.features["action"]["names"] = ["a", "b", "c", "d"]
    data = read_features(meta)
    for names, errors, warnings in (
        (["a", "b", "c", "d"], 0, 0),
        (["b", "a", "c", "d"], 1, 0),
        (["x", "y", "z", "w"], 0, 1),
    ):
        findings = check_acting("p", config_like(meta, action_feature_names=names), data)
        assert (len(lines(findings)), len(lines(findings, is_error=False))) == (errors, warnings)


def test_another_size_of_state_or_action_is_not_compared(meta):
    config = config_like(meta)
    config.input_features["observation.state"] = PolicyFeature(FeatureType.STATE, (7,))
    assert (
        "p has 'observation.state' of shape (7,), the dataset has (4,)"
        in lines(check_acting("p", config, read_features(meta)))[0]
    )


def test_relative_actions_need_state_and_action_in_one_order(meta):
    meta.features["action"]["names"] = ["a", "b", "c", "d"]
    meta.features["observation.state"]["names"] = ["b", "a", "c", "d"]
    config = config_like(meta, use_relative_actions=True)
    assert "need both in one order" in lines(check_training("p", config, read_features(meta)))[0]
    meta.features["observation.state"]["names"] = ["a", "b", "c", "d", "e"]
    assert not lines(check_training("p", config, read_features(meta)))


def test_what_a_dataset_has_beside_is_named(meta):
    meta.features["observation.effort"] = {"dtype": "float32", "shape": (7,), "names": None}
    meta.features["observation.depth"] = {
        "dtype": "video", "shape": (96, 96, 1), "names": None, "info": {"is_depth_map": True},
    }  # fmt: skip
    data = read_features(meta)
    assert set(data.inputs) == {"observation.image", "observation.state"}
    assert [line.split(":")[0] for line in lines(data.findings, is_error=False)] == [
        "observation.depth",
        "observation.effort",
    ]


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ((48, 96, 3), ["height", "width", "channels"], (3, 48, 96)),
        ((48, 96, 3), ["height", "width", "rgb"], (3, 48, 96)),
        ((48, 96, 3), None, (3, 48, 96)),
        ((3, 48, 96), ["channels", "height", "width"], (3, 48, 96)),
        ((3, 48, 96), None, (3, 48, 96)),
    ],
)
def test_images_have_their_channels_first_whatever_the_axes_are_called(meta, shape, names, expected):
    meta.features["observation.image"] |= {"shape": shape, "names": names}
    assert read_features(meta).cameras["observation.image"].shape == expected


def test_names_that_no_policy_gets_are_answered_with_a_map(meta):
    features = {
        "image": meta.features.pop("observation.image"),
        "state": meta.features.pop("observation.state"),
        "actions": meta.features.pop("action"),
    }
    meta.features.update(features)
    renames = {"image": "observation.images.image", "state": "observation.state", "actions": "action"}
    (line,) = lines(read_features(meta).findings)
    assert all(f'"{old}": "{new}"' in line for old, new in renames.items())
    data = read_features(meta, renames)
    assert not lines(data.findings)
    assert set(data.inputs) == {"observation.images.image", "observation.state"}


def test_a_full_disk_is_said_before_the_training(tmp_path, monkeypatch):
    policy = torch.nn.Linear(1024, 1024)  # 4 MiB of weights, 16 MiB with gradients' moments and two files
    usage = namedtuple("usage", "total used free")
    for free, errors, warnings in ((2**20, 1, 0), (20 * 2**20, 0, 1), (2**30, 0, 0)):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        findings = disk.check_disk(tmp_path / "outputs" / "run", policy)
        assert (len(lines(findings)), len(lines(findings, is_error=False))) == (errors, warnings)


def test_weights_are_fetched_only_when_everything_fits(dataset, dense_checkpoint, tmp_path, monkeypatch):
    from lerobot_policy_grids.checkpoint import find

    snapshot = tmp_path / "models--me--base" / "snapshots" / ("ab" * 20)
    shutil.copytree(dense_checkpoint, snapshot)
    fetched = []

    def download(repository, allow_patterns, **options):
        fetched.append("model.safetensors" in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(find, "snapshot_download", download)
    meta = load_metadata(str(dataset))
    del meta.stats["action"]["std"]
    with pytest.raises(DatasetError, match="has no 'std' of 'action'"):
        start("me/base", 16, meta)
    assert fetched == [False]
    start("me/base", 16, load_metadata(str(dataset)))
    assert fetched == [False, False, True]


def test_openpi_names_can_be_trained(tmp_path):
    """The map also renames what LeRobot's processors would drop."""
    root = dataset_of(tmp_path / "data")
    plain = LeRobotDataModule(str(root), num_workers=0, batch_size=6)
    config = TinySmolVLAConfig(device="cpu")
    plain.load(config)
    expected = next(iter(plain.train_dataloader()))
    rename_features(root, {"observation.image": "image", "observation.state": "state", "action": "actions"})
    renames = {"image": "observation.image", "state": "observation.state", "actions": "action"}
    for cache in ("auto", "never"):
        data = LeRobotDataModule(str(root), rename_map=renames, cache=cache, num_workers=0, batch_size=6)
        data.load(config)
        batch = next(iter(data.train_dataloader()))
        assert batch.keys() == expected.keys()
        assert torch.equal(batch["action"], expected["action"])
        assert torch.equal(batch["action_is_pad"], expected["action_is_pad"])
    built = start("tiny", 4, data.meta, rename_map=renames)
    assert built.renames == renames
    loss, _ = built.policy.forward(built.preprocessor(batch))
    assert loss > 0


def rename_features(root, names):
    """Rename features in a dataset's files, as another tool would have called them."""
    import json

    for path in root.rglob("*.json"):
        text = path.read_text()
        for old, new in names.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        path.write_text(json.dumps(json.loads(text)))
    (path,) = root.glob("data/**/*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), path)
