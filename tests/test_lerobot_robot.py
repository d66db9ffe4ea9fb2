"""LeRobot's own commands with a robot: the joint that moves is the joint that was recorded."""

import json
import math
import re
import shlex
from contextlib import nullcontext
from functools import partial, partialmethod

import datasets
import numpy as np
import pytest
import torch
from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.dataset_tools import recompute_stats
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.rtc import RTCConfig
from lerobot.rollout.inference import rtc
from transformers import AutoTokenizer

from fake_robot import FakeRobot
from lerobot_grids.data import load_metadata
from lerobot_grids.policies import load
from lerobot_grids.preflight.features import read_features
from lerobot_grids_cli.main import main
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.characters import write_character_tokenizer
from lerobot_policy_grids.families.pi import SMALL_IMAGE, VOCABULARY, small_sizes
from lerobot_policy_grids.processor_grids import make_processors

# Where each joint was recorded; c never moved, and the others stayed within a few hundredths.
RECORDED = {"a": -1.0, "b": 0.5, "c": 2.0, "gripper": 7.0}
POSITIONS = {"a": 10.0, "b": 20.0, "c": 30.0, "gripper": 40.0}
MOVING = ("a", "b", "c")
OTHER_ORDER = ("gripper", "a", "b", "c")
TOP = "observation.images.top"
HORIZON = 4
# Slow, because a chunk that takes longer than it lasts is never sent: the machine may be busy.
RTC = ("--inference.type=rtc", f"--inference.rtc.execution_horizon={HORIZON}", "--fps=5")
INFERENCE = {"sync": (), "rtc": RTC}
FAMILIES = ("pi0", "tiny_smolvla")
SHORT = {"chunk_size": 8, "n_action_steps": 8, "max_state_dim": 8, "max_action_dim": 8}
CAMERAS = {TOP: 50}

datasets.disable_progress_bars()


def record(root, joints=tuple(RECORDED), cameras=CAMERAS, relative=(), state="observation.state"):
    """Three episodes; every joint is commanded where RECORDED says, or that much from where it is."""
    names = [f"{joint}.pos" for joint in joints]
    vector = {"dtype": "float32", "shape": (len(names),), "names": names}
    image = {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channels"]}
    features = {"action": vector, state: vector} | dict.fromkeys(cameras, image)
    data = LeRobotDataset.create("local/robot", fps=10, features=features, root=root, use_videos=False)
    random = np.random.default_rng(0)
    for _ in range(3):
        position = random.integers(0, 60, len(names))
        for _ in range(12):
            noise = [0.0 if joint == "c" else random.uniform(-0.03, 0.03) for joint in joints]
            action = np.array([RECORDED[joint] for joint in joints]) + noise
            action += position * np.isin(joints, relative)
            frame = {key: np.full((96, 96, 3), value, np.uint8) for key, value in cameras.items()}
            frame |= {"action": action.astype(np.float32), state: position.astype(np.float32)}
            data.add_frame(frame | {"task": "push"})
        data.save_episode()
    data.finalize()
    return root


@pytest.fixture(scope="module", autouse=True)
def _small_policies(tmp_path_factory):
    """π policies are built small, and their tokenizer is one of characters."""
    folder = write_character_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCABULARY)
    real = AutoTokenizer.from_pretrained

    def local(name, *args, **kwargs):
        return real(folder if str(name).startswith("google/paligemma") else name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, small_sizes("pi0"), small_sizes("pi05"):
        patch.setattr(AutoTokenizer, "from_pretrained", local)
        yield


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record(tmp_path_factory.mktemp("data") / "robot")


@pytest.fixture(scope="module")
def other_robot(tmp_path_factory):
    """A recording of the robot whose policy is the base; it had its joints in another order."""
    return record(tmp_path_factory.mktemp("data") / "other", joints=OTHER_ORDER)


def save_base(kind, dataset, folder, **options):
    """A dense policy of random weights as lerobot-train leaves it, trained on `dataset`."""
    meta = LeRobotDatasetMetadata("local/robot", root=dataset)
    data = read_features(meta)
    torch.manual_seed(0)
    policy = get_family(kind).small(data.inputs, data.outputs, folder, **SHORT | options)
    if hasattr(policy.config, "action_feature_names"):
        policy.config.action_feature_names = meta.features["action"]["names"]
    for part in (policy, *make_processors(policy.config, meta.stats)):
        part.save_pretrained(folder)
    return folder


def fit(base, dataset, output, *arguments, code=0):
    """Run `lerobot-grids fit` for a step on every parameter; returns the checkpoint."""
    flags = {
        "policy": base,
        "dataset": dataset,
        "output": output,
        "steps": 1,
        "batch_size": 4,
        "model.train": "all",
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    assert main(["fit", *(f"--{name}={value}" for name, value in flags.items()), *arguments]) == code
    return output / "pretrained_model"


@pytest.fixture
def train(lerobot, tmp_path):
    """Run `lerobot-train` for a step; returns the checkpoint."""

    def run(dataset, *arguments, **flags):
        output = tmp_path / "lerobot-train"
        lerobot(
            "train",
            arguments=(f"--dataset.root={dataset}", f"--output_dir={output}", "--policy.device=cpu", *arguments),
            **{"dataset.repo_id": "local/robot", "policy.push_to_hub": False, "wandb.enable": False},
            **{"steps": 1, "batch_size": 4, "num_workers": 0, "env_eval_freq": 0, **flags},
        )
        return output / "checkpoints" / "last" / "pretrained_model"

    return run


@pytest.fixture
def rollout(lerobot, tmp_path):
    """Run `lerobot-rollout` until the robot was sent a few actions; returns them."""

    def run(policy, *arguments, positions=POSITIONS, views=None, enough=3):
        FakeRobot.sent.clear()
        lerobot(
            "rollout",
            arguments=(f"--policy.path={policy}", f"--robot.calibration_dir={tmp_path / 'calibration'}", *arguments),
            **{"robot.type": "fake_robot", "robot.id": "x", "robot.positions": positions, "robot.enough": enough},
            **{"robot.views": views or {"top": [96, 96, 50]}, "task": "push", "duration": 20, "fps": 50},
            **{"device": "cpu", "play_sounds": False, "return_to_initial_position": False},
        )
        return list(FakeRobot.sent)

    return run


def assert_sent(actions, expected=RECORDED):
    """Every joint was sent its own value; c exactly."""
    assert actions
    for action in actions:
        assert action == {f"{joint}.pos": pytest.approx(value, abs=0.5) for joint, value in expected.items()}
        assert [key for key, value in action.items() if value == expected["c"]] == ["c.pos"]


@pytest.fixture(scope="module", params=FAMILIES)
def fitted(request, recorded, other_robot, tmp_path_factory):
    """A policy of the other robot that `fit` trained on this one."""
    base = save_base(request.param, other_robot, tmp_path_factory.mktemp("base"))
    return fit(base, recorded, tmp_path_factory.mktemp("fit") / "run")


@pytest.fixture
def calls(monkeypatch):
    """What LeRobot's command asked of a policy, each time with noise of its own seed: (method, options)."""
    made = []

    def spy(real, name, policy, batch, **options):
        torch.manual_seed(len(made))
        made.append((name, options))
        return real(policy, batch, **options)

    for name in ("select_action", "predict_action_chunk"):
        real = getattr(GridsPolicy, name)
        monkeypatch.setattr(GridsPolicy, name, partialmethod(partial(spy, real, name)))
    return made


def act_in_process(checkpoint, made, calls):
    """The robot's actions of the same calls without LeRobot's command, each a chunk or a single one: [n, t, d]."""
    calls.clear()
    loaded = load(str(checkpoint), device="cpu")
    if made[0][0] == "predict_action_chunk":
        loaded.policy.config.rtc_config = RTCConfig(execution_horizon=HORIZON)
        loaded.policy.init_rtc_processor()
    state, image = torch.tensor(list(POSITIONS.values())), torch.full((3, 96, 96), 50 / 255)
    chunks = []
    with torch.no_grad():
        for name, options in made:
            batch = loaded.preprocessor({"observation.state": state, TOP: image, "task": "push"})
            action = loaded.postprocessor(getattr(loaded.policy, name)(batch, **options))
            chunks.append(action.reshape(-1, len(POSITIONS)))
    return torch.stack(chunks)


def vectors(actions):
    """The actions of all joints, [n, d], which are the recorded ones."""
    assert_sent(actions)
    return torch.tensor([list(action.values()) for action in actions])


def test_a_synchronous_rollout_sends_the_actions_of_the_policy(fitted, rollout, calls):
    sent = vectors(rollout(fitted, enough=SHORT["n_action_steps"] + 2))
    made = list(calls)
    assert {name for name, _ in made} == {"select_action"}
    actions = act_in_process(fitted, made, calls)[:, 0]
    assert len(sent) == len(actions) == SHORT["n_action_steps"] + 2
    torch.testing.assert_close(sent, actions, rtol=0, atol=1e-5)
    # The second chunk has other noise, so that the comparison is one of chunks.
    assert not torch.equal(actions[0], actions[SHORT["n_action_steps"]])


def test_an_rtc_rollout_sends_chunks_that_continue_the_last_one(fitted, rollout, calls):
    sent = vectors(rollout(fitted, *RTC, enough=6))
    made = list(calls)
    assert {name for name, _ in made} == {"predict_action_chunk"}
    assert set(made[0][1]) == {"inference_delay", "prev_chunk_left_over"}
    assert made[0][1]["prev_chunk_left_over"] is None
    guided = [options["prev_chunk_left_over"] is not None for _, options in made]
    assert guided == [False] + [True] * (len(made) - 1)
    assert made[1][1]["prev_chunk_left_over"].shape[0] == HORIZON
    chunks = act_in_process(fitted, made, calls)
    # Each action is one of a chunk, and later ones are of later chunks, or later in the same.
    places = [(chunks - action).abs().amax(-1).flatten() for action in sent]
    assert all(distance.min() < 1e-5 for distance in places)
    order = [int(distance.argmin()) for distance in places]
    assert order == sorted(set(order))
    # What was left over reaches the base policy, and what it gives depends on it.
    alone = [(name, options | {"prev_chunk_left_over": None}) for name, options in made]
    unguided = act_in_process(fitted, alone, calls)
    different = (unguided - chunks).abs().flatten(1).amax(1) > 1e-3
    assert different.tolist() == guided


@pytest.fixture(scope="module")
def other_policy(request, other_robot, tmp_path_factory):
    """A grids policy of the other robot, trained by `fit`."""
    base = save_base(request.param, other_robot, tmp_path_factory.mktemp("base"))
    return fit(base, other_robot, tmp_path_factory.mktemp("fit") / "run")


@pytest.mark.parametrize("other_policy", ["pi0"], indirect=True)
def test_rollout_of_what_lerobot_train_went_on_with(other_policy, recorded, train, rollout):
    checkpoint = train(recorded, f"--policy.path={other_policy}")
    for arguments in INFERENCE.values():
        assert_sent(rollout(checkpoint, *arguments))


@pytest.mark.parametrize("kind", FAMILIES)
def test_rollout_of_what_lerobot_train_began(kind, recorded, train, rollout):
    image = {"image_resolution": [SMALL_IMAGE, SMALL_IMAGE]} if kind == "pi0" else {}
    sizes = {f"policy.base.{name}": value for name, value in (SHORT | image).items()}
    checkpoint = train(recorded, "--policy.type=grids", f"--policy.base.type={kind}", **sizes)
    for arguments in INFERENCE.values():
        assert_sent(rollout(checkpoint, *arguments))


@pytest.mark.parametrize("fitted", ["pi0"], indirect=True)
def test_with_rtc_a_robot_may_have_its_joints_in_another_order(fitted, rollout):
    """LeRobot sends them by the policy's names. A synchronous rollout, and every state, go by position."""
    assert_sent(rollout(fitted, *RTC, positions={joint: POSITIONS[joint] for joint in OTHER_ORDER}))


@pytest.fixture(scope="module")
def relative_data(tmp_path_factory):
    """(This robot's, the other's) recording, with statistics of relative actions as LeRobot's command computes them."""
    folder = tmp_path_factory.mktemp("relative")
    both = []
    for name, joints in (("own", tuple(RECORDED)), ("other", OTHER_ORDER)):
        root = record(folder / name, joints=joints, relative=MOVING)
        recompute_stats(
            LeRobotDataset("local/robot", root=root),
            relative_action=True,
            relative_exclude_joints=["gripper"],
            chunk_size=SHORT["chunk_size"],
        )
        both.append(root)
    return both


@pytest.mark.parametrize(("kind", "reducer"), [("pi0", "grids"), ("pi05", "uniform")])
def test_relative_actions(kind, reducer, relative_data, rollout, tmp_path, capsys, monkeypatch):
    own, other = relative_data
    base = save_base(kind, other, tmp_path / "base", use_relative_actions=True)
    checkpoint = fit(base, own, tmp_path / "run", f"--reducer={reducer}")
    said = capsys.readouterr()
    assert "statistics" not in said.err
    assert float(re.search(r"validation loss ([\d.e+]+)", said.out)[1]) < 10
    expected = {joint: value + (POSITIONS[joint] if joint in MOVING else 0) for joint, value in RECORDED.items()}
    assert_sent(rollout(checkpoint, *RTC), expected)
    # π0.5 writes its state into the instruction, and LeRobot adds the state to what the policy gives.
    monkeypatch.setattr(rtc, "_RTC_ERROR_RETRY_DELAY_S", 0)
    assert rollout(checkpoint, *RTC, positions=POSITIONS | {"b": math.nan}) == []


def test_statistics_of_absolute_actions_are_refused_for_relative_ones(recorded, tmp_path, capsys, lerobot):
    """The command that the line names makes a dataset that is taken."""
    base = save_base("pi0", recorded, tmp_path / "base", use_relative_actions=True)
    data = record(tmp_path / "data", relative=MOVING)
    fit(base, data, tmp_path / "run", code=1)
    assert not (tmp_path / "run").exists()
    line = capsys.readouterr().err.splitlines()[-1]
    assert "statistics of 'action' are of absolute actions for a.pos, b.pos, c.pos, and" in line
    assert "learns actions relative to the state" in line
    command = shlex.split(line[line.index("lerobot-edit-dataset") :])
    lerobot("edit_dataset", arguments=command[1:])
    fit(base, tmp_path / "data_relative", tmp_path / "run")


def test_statistics_of_relative_actions_are_refused_for_absolute_ones(relative_data, recorded, tmp_path, capsys):
    base = save_base("pi0", recorded, tmp_path / "base")
    fit(base, relative_data[0], tmp_path / "run", code=1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert "statistics of 'action' are of relative actions for a.pos, b.pos, c.pos" in line
    assert "relative_action" not in line


@pytest.mark.parametrize("how", INFERENCE)
def test_no_action_follows_from_a_state_that_is_not_a_number(how, fitted, rollout, monkeypatch, caplog):
    monkeypatch.setattr(rtc, "_RTC_ERROR_RETRY_DELAY_S", 0)
    with nullcontext() if how == "rtc" else pytest.raises(GridsError) as refused:
        rollout(fitted, *INFERENCE[how], positions=POSITIONS | {"b": math.nan})
    assert FakeRobot.sent == []
    said = caplog.text if how == "rtc" else str(refused.value)
    assert "'observation.state' holds NaN or infinity; check what the robot reads" in said


@pytest.mark.parametrize("other_policy", FAMILIES, indirect=True)
def test_lora_and_its_resumed_training(other_policy, recorded, train, rollout, lerobot):
    """The processors are the adapter's, and not those of the policy under it."""
    checkpoint = train(recorded, f"--policy.path={other_policy}", "--peft.method_type=LORA", "--peft.r=4")
    assert_sent(rollout(checkpoint, *RTC))
    lerobot("train", config_path=str(checkpoint / "train_config.json"), resume=True, steps=2)
    resumed = checkpoint.parents[1] / "000002" / "pretrained_model"
    assert (resumed / "adapter_config.json").is_file()
    for arguments in INFERENCE.values():
        assert_sent(rollout(resumed, *arguments))


@pytest.fixture
def seen(monkeypatch):
    """The batches that a policy acts on."""
    batches = []

    def spy(real, policy, batch, **kwargs):
        batches.append(dict(batch))
        return real(policy, batch, **kwargs)

    for name in ("select_action", "predict_action_chunk"):
        monkeypatch.setattr(GridsPolicy, name, partialmethod(partial(spy, getattr(GridsPolicy, name))))
    return batches


@pytest.mark.parametrize("kind", FAMILIES)
def test_renamed_cameras_and_state(kind, rollout, seen, tmp_path):
    cameras = {"front": 20, "wrist": 220}
    policys = {f"observation.images.camera{number}": value for number, value in enumerate(cameras.values())}
    base = save_base(kind, record(tmp_path / "other", cameras=policys), tmp_path / "base")
    own = {f"observation.images.{name}": value for name, value in cameras.items()}
    names = dict(zip(own, policys, strict=True))
    data = record(tmp_path / "data", cameras=own, state="observation.joints")
    renamed = {**names, "observation.joints": "observation.state"}
    checkpoint = fit(base, data, tmp_path / "run", f"--rename_map={json.dumps(renamed)}")
    views = {name: [96, 96, value] for name, value in reversed(cameras.items())}
    with pytest.raises(ValueError, match="Use --rename_map"):
        rollout(checkpoint, views=views)
    mean = np.array(load_metadata(str(data)).stats["observation.joints"]["mean"])
    std = np.array(load_metadata(str(data)).stats["observation.joints"]["std"])
    for arguments in INFERENCE.values():
        assert_sent(rollout(checkpoint, *arguments, f"--rename_map={json.dumps(names)}", views=views))
        assert {name: round(255 * float(seen[-1][name].mean())) for name in policys} == policys
        expected = (list(POSITIONS.values()) - mean) / std
        np.testing.assert_allclose(seen[-1]["observation.state"][0], expected, atol=1e-4)


@pytest.mark.parametrize("fitted", FAMILIES, indirect=True)
def test_a_camera_of_another_aspect_ratio_is_named(fitted, rollout, caplog):
    rollout(fitted, views={"top": [48, 48, 50]})
    assert "aspect ratio" not in caplog.text
    assert_sent(rollout(fitted, views={"top": [96, 128, 50]}))
    (said,) = [record.getMessage() for record in caplog.records if "aspect ratio" in record.getMessage()]
    assert f"camera '{TOP}' sends images of 96 x 128 pixels" in said


def test_lerobot_eval_with_a_renamed_camera(lerobot, seen, tmp_path):
    camera = "observation.images.camera1"
    data = record(tmp_path / "data", cameras={camera: 20})
    checkpoint = fit(save_base("tiny_smolvla", data, tmp_path / "base"), data, tmp_path / "run")
    lerobot(
        "eval",
        **{"policy.path": str(checkpoint), "policy.device": "cpu", "rename_map": {"observation.image": camera}},
        **{"env.discover_packages_path": "lerobot_grids.simulation", "env.type": "grids_metaworld"},
        **{"env.task": "push-v3", "env.max_steps": 2, "eval.n_episodes": 1, "eval.batch_size": 1},
        output_dir=str(tmp_path / "eval"),
    )
    assert seen[0][camera].std() > 0
    assert "observation.image" not in seen[0]
