"""What training starts from: families, checkpoints, datasets that fit them, and what does not fit."""

import shutil

import pytest
import torch

from lerobot_grids.data.datamodule import load_metadata
from lerobot_grids.policies import load, parse_tokens, start
from lerobot_policy_grids.errors import BudgetError, DatasetError, GridsError, UnsupportedPolicyError
from recordings import dataset_of


def test_a_grids_checkpoint_can_be_trained_on(dataset, grids_checkpoint):
    built = start(str(grids_checkpoint), 36, load_metadata(str(dataset)))
    assert built.policy.num_tokens == 36
    with pytest.raises(BudgetError, match=r"1 \.\. 36"):
        start(str(grids_checkpoint), 37, load_metadata(str(dataset)))
    with pytest.raises(BudgetError, match="dense"):
        start(str(grids_checkpoint), "dense", load_metadata(str(dataset)))


def test_what_a_grids_checkpoint_was_built_with_is_kept(dataset, grids_checkpoint):
    meta = load_metadata(str(dataset))
    assert start(str(grids_checkpoint), None, meta).policy.num_tokens == 16
    for reducer in ("blind", {"condition_on": ["image"]}, {"type": "grids", "num_tokens_max": 40}):
        with pytest.raises(GridsError, match="was built with"):
            start(str(grids_checkpoint), 16, meta, reducer=reducer)
    with pytest.raises(GridsError, match="was built with position_ids=consecutive"):
        start(str(grids_checkpoint), 16, meta, position_ids="dense")


def test_a_checkpoint_takes_the_datasets_image_shape(dense_checkpoint, tmp_path):
    """Anchors avoid the letterbox of this camera, not of the one the checkpoint was trained with."""
    meta = load_metadata(str(dataset_of(tmp_path / "wide", image=(48, 96, 3))))
    policy = start(str(dense_checkpoint), 16, meta).policy
    assert policy.config.input_features["observation.image"].shape == (3, 48, 96)
    assert policy.family.layout(policy.base).region == (0.0, 0.5, 1.0, 1.0)
    assert (policy.reducer.anchor_cells[:, 1] >= 6).all()


def test_the_commit_of_the_base_is_kept(dataset, dense_checkpoint, tmp_path, monkeypatch):
    from lerobot_policy_grids.checkpoint import find

    snapshot = tmp_path / "models--me--base" / "snapshots" / ("ab" * 20)
    shutil.copytree(dense_checkpoint, snapshot)
    monkeypatch.setattr(find, "snapshot_download", lambda *args, **options: str(snapshot))
    built = start("me/base@main", 16, load_metadata(str(dataset)))
    folder = tmp_path / "saved"
    folder.mkdir()
    built.save(folder)
    saved = load(str(folder)).policy.config
    assert (saved.base_repo_id, saved.base_revision) == ("me/base", "ab" * 20)


def test_a_state_too_large_for_the_policy(tmp_path):
    meta = load_metadata(str(dataset_of(tmp_path / "big", state=40)))
    with pytest.raises(DatasetError, match=r"state has 40 dimensions, and tiny takes at most 32 \(max_state_dim\)"):
        start("tiny", 16, meta)


@pytest.mark.parametrize(
    ("rename_map", "message"),
    [
        ({"observation.imagee": "x"}, "rename_map names observation.imagee"),
        ({"observation.images.wrist": "observation.images.top"}, "to two features"),
    ],
)
def test_rename_maps_that_would_lose_a_feature(two_camera_dataset, rename_map, message):
    with pytest.raises(DatasetError, match=message):
        start("tiny", 16, load_metadata(str(two_camera_dataset)), rename_map=rename_map)


def test_other_camera_names_are_an_error_that_says_how_to_rename(two_camera_dataset, dense_checkpoint):
    meta = load_metadata(str(two_camera_dataset))
    with pytest.raises(DatasetError, match=r"observation\.images\.top.*rename_map"):
        start(str(dense_checkpoint), 16, meta)
    rename = {"observation.images.top": "observation.image"}
    built = start(str(dense_checkpoint), 16, meta, rename_map=rename)
    batch = {
        "observation.images.top": torch.rand(1, 3, 96, 96),
        "observation.state": torch.zeros(1, 4),
        "task": ["push"],
    }
    assert built.policy.select_action(built.preprocessor(batch)).shape == (1, 4)


def test_unknown_policies(dataset, tmp_path):
    meta = load_metadata(str(dataset))
    with pytest.raises(UnsupportedPolicyError, match="'pi9' is unknown"):
        start("pi9", 16, meta)
    (tmp_path / "config.json").write_text('{"type": "act"}')
    with pytest.raises(UnsupportedPolicyError, match="'act' is not supported"):
        start(str(tmp_path), 16, meta)


def test_a_budget_above_the_grid_names_the_grid(dataset):
    with pytest.raises(BudgetError, match=r"999 tokens per camera.*12 x 12 = 144"):
        start("tiny", 999, load_metadata(str(dataset)))


def test_dense_takes_no_reducer(dataset):
    with pytest.raises(GridsError, match="drop one"):
        start("tiny", "dense", load_metadata(str(dataset)), reducer="blind")


@pytest.mark.parametrize("text", ["0", "-3", "abc", "1.5", ""])
def test_what_is_no_budget(text):
    with pytest.raises(BudgetError, match="no token budget"):
        parse_tokens(text)


def test_budgets():
    assert parse_tokens("dense") == "dense"
    assert parse_tokens(" 16 ") == parse_tokens(16) == 16
