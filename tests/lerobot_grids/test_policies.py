"""What training starts from: families, checkpoints, datasets that fit them, and what does not fit."""

import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.torch import load_file, save_file

from lerobot_grids.data import load_metadata
from lerobot_grids.policies import find_source, flow_steps, load, parse_tokens, start
from lerobot_policy_grids.errors import BudgetError, CheckpointError, DatasetError, GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.pi import small_sizes
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
    for reducer in ("blind", {"condition_on": ["language"]}, {"type": "grids", "num_tokens_max": 40}):
        with pytest.raises(GridsError, match="was built with"):
            start(str(grids_checkpoint), 16, meta, reducer=reducer)
    with pytest.raises(GridsError, match="was built with position_ids=dense"):
        start(str(grids_checkpoint), 16, meta, position_ids="consecutive")


def test_a_checkpoint_takes_the_datasets_image_shape(dense_checkpoint, tmp_path):
    """Anchors avoid the letterbox of this camera, not of the one the checkpoint was trained with."""
    meta = load_metadata(str(dataset_of(tmp_path / "wide", image=(48, 96, 3))))
    policy = start(str(dense_checkpoint), 16, meta).policy
    assert policy.config.input_features["observation.image"].shape == (3, 48, 96)
    assert policy.family.layout(policy.base).regions == ((0.0, 0.5, 1.0, 1.0),)
    assert (policy.reducer.anchors(16)[:, 1] > 0.5).all()


@pytest.mark.parametrize("steps", [1, 3])
def test_flow_steps_are_those_of_euler(grids_checkpoint, steps):
    """From noise at time 1 down to 0, each step by the mean velocity there."""
    policy = load(str(grids_checkpoint), num_steps=steps).policy
    assert flow_steps(policy) == steps
    batch = {key: torch.rand(2, *feature.shape) for key, feature in policy.config.input_features.items()}
    batch["observation.language.tokens"] = torch.full((2, 32), 7)
    batch["observation.language.attention_mask"] = torch.ones(2, 32, dtype=torch.bool)
    velocities = []
    policy.base.model.action_out_proj.register_forward_hook(lambda module, inputs, output: velocities.append(output))
    noise = torch.randn(2, 16, 32)
    chunk = policy.predict_action_chunk(batch, noise=noise)
    assert len(velocities) == steps
    torch.testing.assert_close(chunk, (noise - sum(velocities) / steps)[..., : chunk.shape[-1]])


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
    for written, line in (
        ("Pi0", r"'Pi0' is unknown; did you mean pi0\? Otherwise give a family \(act"),
        ("Diffusion", "'diffusion' is not supported: a spatial softmax"),
        ("nothing", r"'nothing' is unknown; give a family \(act"),
    ):
        with pytest.raises(UnsupportedPolicyError, match=line):
            find_source(written)
    (tmp_path / "config.json").write_text('{"type": "tdmpc"}')
    with pytest.raises(UnsupportedPolicyError, match="'tdmpc' is not supported: its convolutions"):
        start(str(tmp_path), 16, meta)


def test_a_budget_above_the_grid_names_the_grid(dataset):
    with pytest.raises(BudgetError, match=r"999 tokens per camera.*12 x 12 = 144"):
        start("tiny", 999, load_metadata(str(dataset)))


def test_a_schedule_through_budgets_that_a_reducer_lacks_is_named(dataset):
    with pytest.raises(BudgetError, match=r"no even lattice .*token schedule 'linear' asks for that K"):
        start("tiny", 16, load_metadata(str(dataset)), reducer="pool", schedule="linear")
    with pytest.raises(BudgetError, match="a blind policy, which has no visual tokens"):
        start("tiny", None, load_metadata(str(dataset)), reducer="blind", schedule="elastic")


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


def describing(root, names, joints=4, state="observation.state"):
    """A dataset whose actions have these names, and a constant offset that only statistics know."""
    features = {
        "observation.image": {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channels"]},
        state: {"dtype": "float32", "shape": (joints,), "names": None},
        "action": {"dtype": "float32", "shape": (joints,), "names": names},
    }
    data = LeRobotDataset.create("local/x", fps=10, features=features, root=root, use_videos=False)
    random = np.random.default_rng(0)
    for _ in range(6):
        values = random.normal(50, 30, joints).astype(np.float32)
        frame = {"observation.image": np.zeros((96, 96, 3), np.uint8), state: values, "action": values, "task": "push"}
        data.add_frame(frame)
    data.save_episode()
    data.finalize()
    return load_metadata(str(root))


@pytest.mark.parametrize("names", [["a", "b", "c", "grip"], {"motors": ["a", "b"], "hand": ["c", "grip"]}], ids=str)
def test_the_names_of_the_actions_are_the_datasets(names, tmp_path):
    """By the base's names a command would send each joint another joint's value."""
    meta = describing(tmp_path / "data", names)
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    inputs = {
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 112, 112)),
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
    }
    base = get_family("pi0").small(inputs, outputs, tmp_path)
    base.config.action_feature_names = ["grip", "a", "b", "c"]
    base.save_pretrained(tmp_path / "base")
    with small_sizes("pi0"), patch("lerobot_grids.policies.starting.make_processors", lambda *args: (Steps(), Steps())):
        built = start(str(tmp_path / "base"), 16, meta)
    assert built.policy.config.action_feature_names == ["a", "b", "c", "grip"]
    assert built.policy.base.config.action_feature_names == ["a", "b", "c", "grip"]


class Steps:
    steps = ()


def test_a_renamed_state_is_normalised(tmp_path):
    meta = describing(tmp_path / "data", None, state="observation.qpos")
    built = start("tiny", 16, meta, rename_map={"observation.qpos": "observation.state"})
    batch = {
        "observation.image": torch.zeros(1, 3, 96, 96),
        "observation.qpos": torch.as_tensor(meta.stats["observation.qpos"]["mean"]).float()[None],
        "task": ["push"],
    }
    torch.testing.assert_close(built.preprocessor(batch)["observation.state"], torch.zeros(1, 4))


def test_statistics_that_are_missing_are_named(dataset, dense_checkpoint, tmp_path):
    meta = load_metadata(str(dataset))
    del meta.stats["action"]["std"]
    with pytest.raises(DatasetError, match=r"has no 'std' of 'action', which would stay as it is"):
        start("tiny", 16, meta)
    folder = tmp_path / "foreign"
    shutil.copytree(dense_checkpoint, folder)
    (state,) = folder.glob("policy_preprocessor_step_*.safetensors")
    tensors = load_file(state)
    for change, message in (
        (lambda name, value: ("so100.buffer." + name, value), "has no 'mean' of 'observation.state'"),
        (lambda name, value: (name, torch.full_like(value, torch.nan)), "that is not finite"),
        (lambda name, value: (name, torch.full_like(value, 1e30)), "beyond 1e"),
        (lambda name, value: (name, value[:3].clone() if value.ndim else value), "with 3 values, expected 4"),
    ):
        save_file(dict(change(name, value) for name, value in tensors.items()), state)
        with pytest.raises(CheckpointError, match=message):
            load(str(folder))


def test_folders_of_lerobot_train_are_understood(dense_checkpoint, tmp_path):
    shutil.copytree(dense_checkpoint, tmp_path / "run" / "checkpoints" / "000002" / "pretrained_model")
    (tmp_path / "run" / "checkpoints" / "last").symlink_to("000002")
    assert load(tmp_path / "run").policy.config.type == "tiny_smolvla"
    peft = tmp_path / "peft"
    shutil.copytree(dense_checkpoint, peft)
    (peft / "model.safetensors").rename(peft / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is a PEFT adapter"):
        load(peft)
