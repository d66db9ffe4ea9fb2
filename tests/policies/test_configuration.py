"""GridsConfig: what LeRobot reads and sets on it reaches the base, and back."""

import json
import shutil
from dataclasses import asdict, dataclass, replace

import draccus
import pytest
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

from driving import config_of
from lerobot_policy_grids import GridsConfig, ReducerConfig, TinySmolVLAConfig
from lerobot_policy_grids.base_options import base_options
from lerobot_policy_grids.checkpoint import read_config
from lerobot_policy_grids.configuration_grids import BasePolicyChoice
from lerobot_policy_grids.errors import BudgetError, CheckpointError, GridsError
from lerobot_policy_grids.families import families, get_family
from lerobot_policy_grids.reducers import reducer_config

INPUTS = {
    "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
    "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
}
OUTPUTS = {"action": PolicyFeature(FeatureType.ACTION, (4,))}


def tiny(**options):
    features = {name: options.pop(name) for name in ("input_features", "output_features") if name in options}
    config = config_of(TinySmolVLAConfig(device="cpu"), **options)
    for name, value in features.items():
        setattr(config, name, value)
    config.share_with_base()
    return config


@pytest.mark.parametrize(
    "config",
    [
        tiny(input_features=INPUTS, output_features=OUTPUTS),
        tiny(num_tokens=4, num_tokens_max=36, condition_on=["language"], sample_after_layer=0),
        *(tiny(reducer=name) for name in ReducerConfig.get_known_choices()),
        tiny(schedule="elastic", position_ids="dense", num_tokens_max=36),
        config_of(SmolVLAConfig(device="cpu", chunk_size=8, n_action_steps=8), num_tokens=9),
    ],
)
def test_saved_and_read_back_equal(config, tmp_path):
    config._save_pretrained(tmp_path)
    read = PreTrainedConfig.from_pretrained(tmp_path)
    assert type(read) is GridsConfig
    if config.reducer.budget:
        config.reducer.num_tokens_max = config.reducer.largest
    assert read == config
    assert read_config(tmp_path) == config
    assert json.loads((tmp_path / "config.json").read_text())["version"] == 1


def test_where_the_weights_came_from_is_not_saved(tmp_path):
    config = tiny()
    config.base.pretrained_path = "/home/someone/secret"
    config.pretrained_path = "/home/someone/else"
    config._save_pretrained(tmp_path)
    assert "someone" not in (tmp_path / "config.json").read_text()
    assert config.base.pretrained_path == "/home/someone/secret"


def test_every_registered_policy_but_ourselves_is_a_base():
    choices = BasePolicyChoice.get_known_choices()
    assert "grids" in PreTrainedConfig.get_known_choices()
    assert "grids" not in choices
    assert {"smolvla", "pi0", "tiny_smolvla"} <= choices.keys()


@dataclass
class Command:
    """What LeRobot's commands have: a field that holds any policy."""

    policy: PreTrainedConfig | None = None


def test_base_fields_are_parsed_from_a_command_line():
    flags = {"type": "grids", "base.type": "smolvla", "base.chunk_size": 8, "base.n_action_steps": 8, "num_tokens": 9}
    config = draccus.parse(Command, args=[f"--policy.{name}={value}" for name, value in flags.items()]).policy
    assert (config.type, config.base.type, config.base.chunk_size) == ("grids", "smolvla", 8)
    assert config.reducer.num_tokens == 9


def test_each_reducer_takes_its_own_options_and_no_others():
    def parse(**flags):
        arguments = [f"--policy.{name}={value}" for name, value in {"type": "grids", **flags}.items()]
        return draccus.parse(Command, args=arguments).policy.reducer

    base = {"base.type": "tiny_smolvla"}
    pool = parse(**base, **{"reducer.type": "pool", "reducer.num_tokens": 9})
    assert (pool.type, pool.num_tokens) == ("pool", 9)
    assert parse(**base, **{"reducer.type": "fastv", "reducer.full_layers": 1}).full_layers == 1
    assert parse(**base, **{"reducer.reading_width": 2.0}).reading_width == 2.0
    assert parse(**base, **{"reducer.sample_after_layer": 1}).inside == 1
    for name, option in (
        ("pool", "reading_width"),
        ("pool", "sample_after_layer"),
        ("blind", "num_tokens"),
        ("grids", "full_layers"),
        ("fastv", "camera_tokens"),
    ):
        with pytest.raises(draccus.utils.DecodingError, match=option):
            parse(**base, **{"reducer.type": name, f"reducer.{option}": 1})
        with pytest.raises(GridsError, match=f"has no option {option}"):
            tiny(reducer=name, **{option: 1})


def test_what_lerobot_sets_reaches_the_base():
    config = tiny()
    config.input_features, config.output_features = dict(INPUTS), dict(OUTPUTS)
    config.share_with_base()
    assert config.base.input_features == INPUTS
    assert config.base.output_features == OUTPUTS
    config.rtc_config = RTCConfig()
    assert config.base.rtc_config is config.rtc_config
    assert "rtc_config" not in vars(config)


def test_what_lerobot_reads_is_the_base_policys():
    config = tiny()
    assert config.chunk_size == 16
    assert config.n_action_steps == 8
    assert config.action_delta_indices == list(range(16))
    assert config.observation_delta_indices == [0]
    assert config.normalization_mapping["ACTION"] is NormalizationMode.MEAN_STD
    assert config.get_optimizer_preset().lr == config.base.optimizer_lr
    assert config.get_scheduler_preset().peak_lr == config.base.optimizer_lr
    # SmolVLA has no dtype; LeRobot asks with hasattr and falls back to use_amp.
    assert not hasattr(config, "dtype")
    pi0 = GridsConfig(base=PreTrainedConfig.get_choice_class("pi0")(device="cpu"))
    assert pi0.dtype == pi0.base.dtype


def test_device_follows_the_base_and_then_leads():
    config = tiny()
    assert config.device == "cpu"


@pytest.mark.parametrize("k", [0, -3])
def test_impossible_budgets(k):
    with pytest.raises(BudgetError, match="choose num_tokens"):
        tiny(num_tokens=k)
    with pytest.raises(BudgetError, match="choose num_tokens"):
        GridsConfig(base=TinySmolVLAConfig(device="cpu"), num_tokens=k)
    with pytest.raises(BudgetError, match=r"1 \.\. 4"):
        tiny(num_tokens=5, num_tokens_max=4)


@pytest.mark.parametrize("wrong", [{"base": "pi0"}, {"schedule": None}, {"schedule_steps": "9"}, {"version": "1"}])
def test_a_field_of_a_wrong_type_is_named(wrong):
    (name,) = wrong
    with pytest.raises(GridsError, match=f"has {name}=.*, expected "):
        GridsConfig(**({"base": TinySmolVLAConfig(device="cpu")} | wrong))


def test_other_mistakes():
    with pytest.raises(GridsError, match="magic"):
        tiny(reducer="magic")
    with pytest.raises(GridsError, match="smell"):
        tiny(condition_on=["smell"])
    with pytest.raises(GridsError, match="keeps the position ids"):
        tiny(reducer="fastv", position_ids="dense")
    with pytest.raises(BudgetError, match="keeps none"):
        GridsConfig(base=TinySmolVLAConfig(device="cpu"), reducer=reducer_config("blind"), num_tokens=4)
    with pytest.raises(GridsError, match="lerobot-grids push"):
        GridsConfig(base=TinySmolVLAConfig(device="cpu"), repo_id="me/policy")
    with pytest.raises(CheckpointError, match="version 2"):
        tiny(version=2)
    with pytest.raises(GridsError, match=r"--policy\.base\.type"):
        GridsConfig().require_base()


def test_options_of_the_base_are_options_of_the_wrapper(grids_checkpoint, tmp_path):
    """lerobot-eval --policy.path=... --policy.n_action_steps=1"""
    config = PreTrainedConfig.from_pretrained(grids_checkpoint, cli_overrides=["--n_action_steps=1", "--num_steps=3"])
    assert (config.base.n_action_steps, config.base.num_steps, config.n_action_steps) == (1, 3, 1)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "n_action_steps" not in saved
    assert saved["base"]["n_action_steps"] == 1
    assert "n_action_steps" not in asdict(config)
    assert replace(config, schedule="elastic").n_action_steps == 1


@pytest.mark.parametrize("policy_type", families())
def test_the_number_of_steps_is_an_option_of_the_wrapper(policy_type):
    """Whatever other families call theirs, and whether it may be None there."""
    assert get_family(policy_type).flow_steps in {None, *base_options()}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--num_inference_steps=3", "the 'tiny_smolvla' policy has no option num_inference_steps"),
        ("--n_action_steps=99", "cannot have .*'n_action_steps': 99"),
    ],
)
def test_options_that_the_base_cannot_have(grids_checkpoint, option, message):
    with pytest.raises(GridsError, match=message):
        PreTrainedConfig.from_pretrained(grids_checkpoint, cli_overrides=[option])


def test_the_options_that_weights_were_trained_with_come_with_them(dense_checkpoint, tmp_path):
    """lerobot-train --policy.type=grids --policy.base.pretrained_path=..."""
    folder = tmp_path / "base"
    shutil.copytree(dense_checkpoint, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"chunk_size": 4, "n_action_steps": 4}))
    config = GridsConfig(base=TinySmolVLAConfig(device="cpu", pretrained_path=folder, num_steps=7))
    assert (config.base.chunk_size, config.base.n_action_steps, config.base.num_steps) == (4, 4, 7)
    shutil.rmtree(folder)
    # A complete checkpoint does not need them; who does says so.
    assert GridsConfig(base=TinySmolVLAConfig(device="cpu", pretrained_path=folder)).chunk_size == 16
