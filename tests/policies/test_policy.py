"""GridsPolicy as LeRobot drives it."""

import re
import shutil
from dataclasses import fields

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig

from lerobot_grids.data import load_metadata
from lerobot_policy_grids import GridsConfig, GridsPolicy, ReducerConfig, TinySmolVLAConfig, compress
from lerobot_policy_grids.checkpoint import build
from lerobot_policy_grids.errors import BudgetError, CheckpointError, GridsError
from lerobot_policy_grids.families import families, get_family


def test_lerobots_factories_build_it(dataset):
    meta = load_metadata(str(dataset))
    config = GridsConfig(base=TinySmolVLAConfig(device="cpu"), num_tokens=9)
    policy = make_policy(config, ds_meta=meta)
    assert isinstance(policy, GridsPolicy)
    assert get_policy_class("grids") is GridsPolicy
    assert policy.base.config.image_features.keys() == {"observation.image"}
    preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=meta.stats)
    batch = {"observation.image": torch.rand(3, 96, 96), "observation.state": torch.zeros(4), "task": "push"}
    action = postprocessor(policy.select_action(preprocessor(batch)))
    assert action.shape == (1, 4)


def test_actions_come_from_a_queue_that_reset_empties(grids_checkpoint):
    policy = GridsPolicy.from_pretrained(grids_checkpoint)
    looks = []
    policy.reducer.register_forward_hook(lambda *args: looks.append(1))
    preprocessor, _ = make_pre_post_processors(policy.config, pretrained_path=str(grids_checkpoint))
    batch = {"observation.image": torch.rand(3, 96, 96), "observation.state": torch.zeros(4), "task": "push"}
    batch = preprocessor(batch)
    for _ in range(policy.config.n_action_steps + 1):
        policy.select_action(dict(batch))
    assert len(looks) == 2
    policy.reset()
    policy.select_action(dict(batch))
    assert len(looks) == 3


def test_from_pretrained_needs_no_source_of_the_base(grids_checkpoint, tmp_path):
    """A checkpoint is whole: moved alone to another place, it loads."""

    copy = tmp_path / "elsewhere"
    shutil.copytree(grids_checkpoint, copy)
    ours, theirs = (GridsPolicy.from_pretrained(folder).state_dict() for folder in (grids_checkpoint, copy))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "tmp" not in (copy / "config.json").read_text()
    assert "tmp" not in (copy / "policy_preprocessor.json").read_text()


def test_the_run_time_budget_is_a_flag(grids_checkpoint):
    from lerobot.configs import PreTrainedConfig

    config = PreTrainedConfig.from_pretrained(grids_checkpoint, cli_overrides=["--num_tokens=25"])
    assert GridsPolicy.from_pretrained(grids_checkpoint, config=config).num_tokens == 25
    with pytest.raises(BudgetError, match=r"1 \.\. 36"):
        PreTrainedConfig.from_pretrained(grids_checkpoint, cli_overrides=["--num_tokens=37"])


def test_lax_loading_is_refused(grids_checkpoint):
    with pytest.raises(CheckpointError, match="random weights"):
        GridsPolicy.from_pretrained(grids_checkpoint, strict=False)


def test_a_dense_checkpoint_is_no_grids_checkpoint(dense_checkpoint):
    with pytest.raises(CheckpointError, match="has policy type 'tiny_smolvla', not 'grids'"):
        GridsPolicy.from_pretrained(dense_checkpoint)


def test_a_hub_id_without_a_network_names_the_cause():
    with pytest.raises(CheckpointError, match="cannot be fetched from the Hub"):
        GridsPolicy.from_pretrained("someone/something")


def test_an_action_that_is_no_number_is_not_sent(grids_checkpoint, monkeypatch):
    policy = GridsPolicy.from_pretrained(grids_checkpoint)
    for name in ("select_action", "predict_action_chunk"):
        monkeypatch.setattr(policy.base, name, lambda batch: torch.tensor([[0.0, torch.nan]]))
        with pytest.raises(GridsError, match="NaN or infinity"):
            getattr(policy, name)({})


def test_processors_come_from_the_checkpoint_that_was_checked(grids_checkpoint, tmp_path, monkeypatch):
    """LeRobot's commands take them from `config.pretrained_path`; a repository's main may have others by then."""
    from lerobot.configs import PreTrainedConfig

    from lerobot_policy_grids.checkpoint import find

    snapshot = tmp_path / "models--me--x" / "snapshots" / ("ab" * 20)
    shutil.copytree(grids_checkpoint, snapshot)
    monkeypatch.setattr(find, "snapshot_download", lambda *args, **options: str(snapshot))
    config = PreTrainedConfig.from_pretrained(snapshot)
    config.pretrained_path = "me/x"
    # Of the run that trained it; resuming does not need the base again.
    config.base.pretrained_path = "a/base/that/moved"
    policy = GridsPolicy.from_pretrained("me/x", config=config, revision="ab" * 20)
    assert config.pretrained_path == policy.config.pretrained_path == snapshot


def test_without_a_base_it_says_what_to_pass():
    with pytest.raises(GridsError, match=r"--policy\.base\.type"):
        GridsPolicy(GridsConfig(device="cpu"))


def features_of(inputs):
    return {name: PolicyFeature(FeatureType[kind], shape) for name, (kind, shape) in inputs.items()}


STATE = {"observation.state": ("STATE", (4,))}
ODD = {
    "no camera": (STATE, {}, "no camera in its input_features"),
    "no features": ({}, {}, "no camera in its input_features"),
    "no size": (STATE | {"observation.image": ("VISUAL", (96,))}, {}, r"shape \(96,\), expected \(3, height"),
    "depth": (STATE | {"observation.image": ("VISUAL", (1, 96, 96))}, {}, r"shape \(1, 96, 96\), expected \(3"),
    "no state": ({"observation.image": ("VISUAL", (3, 96, 96))}, {}, "reads 'observation.state', which is not in"),
    "text for K": (None, {"num_tokens": "16"}, "num_tokens='16' is not a whole number"),
    "no reducer": (None, {"reducer": None}, "reducer=None, expected ReducerConfig"),
    "a reducer's class": (None, {"reducer": ReducerConfig}, "expected ReducerConfig"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_policy_or_an_option_that_cannot_work_is_named(case):
    inputs, options, message = ODD[case]
    inputs = STATE | {"observation.image": ("VISUAL", (3, 96, 96))} if inputs is None else inputs
    outputs = features_of({"action": ("ACTION", (4,))})
    config = TinySmolVLAConfig(device="cpu", input_features=features_of(inputs), output_features=outputs)
    base = build(config)
    with pytest.raises(GridsError, match=message):
        compress(base, **options)


@pytest.mark.parametrize("wrong", [None, object(), torch.nn.Linear(2, 2)])
def test_what_is_no_policy_is_named(wrong):
    with pytest.raises(GridsError, match=f"{type(wrong).__name__} is not a LeRobot policy"):
        compress(wrong)
    with pytest.raises(GridsError, match=f"takes a GridsConfig, not {type(wrong).__name__}"):
        GridsPolicy(wrong)


def test_a_base_can_be_loaded_from_its_checkpoint(dense_checkpoint):
    """lerobot-train --policy.type=grids --policy.base.pretrained_path=..."""
    dense = get_policy_class("tiny_smolvla").from_pretrained(dense_checkpoint)
    base = TinySmolVLAConfig(device="cpu", pretrained_path=dense_checkpoint)
    base.input_features, base.output_features = dense.config.input_features, dense.config.output_features
    policy = GridsPolicy(GridsConfig(base=base))
    assert all(torch.equal(value, policy.base.state_dict()[name]) for name, value in dense.state_dict().items())


def test_real_time_chunking_reaches_the_base(grids_checkpoint):
    policy = GridsPolicy.from_pretrained(grids_checkpoint)
    if hasattr(policy.base, "supports_rtc"):  # from LeRobot 0.6.1 on
        assert policy.supports_rtc() == policy.base.supports_rtc()
    policy.config.rtc_config = RTCConfig(enabled=True, execution_horizon=4)
    policy.init_rtc_processor()
    assert policy.base.rtc_processor is not None
    assert policy.base.model.rtc_processor is policy.base.rtc_processor
    preprocessor, _ = make_pre_post_processors(policy.config, pretrained_path=str(grids_checkpoint))
    batch = {"observation.image": torch.rand(3, 96, 96), "observation.state": torch.zeros(4), "task": "push"}
    chunk = policy.predict_action_chunk(
        preprocessor(batch), inference_delay=2, prev_chunk_left_over=torch.zeros(1, 8, 32), execution_horizon=4
    )
    assert torch.isfinite(chunk).all()


def test_lora_trains_adapters_and_the_reducer_and_nothing_else(grids_checkpoint):
    """What lerobot-train --peft does."""
    policy = GridsPolicy.from_pretrained(grids_checkpoint)
    policy.config.pretrained_path = grids_checkpoint
    preprocessor, _ = make_pre_post_processors(policy.config, pretrained_path=str(grids_checkpoint))
    batch = preprocessor(
        {
            "observation.image": torch.rand(2, 3, 96, 96),
            "observation.state": torch.zeros(2, 4),
            "action": torch.randn(2, 16, 4),
            "task": ["push", "pull"],
        }
    )
    lora = policy.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 4})
    loss, _ = lora.forward(batch)
    loss.backward()
    trained = {name for name, parameter in lora.named_parameters() if parameter.grad is not None}
    assert any("lora_A" in name for name in trained)
    assert any("query.weight" in name for name in trained)
    assert all("lora_" in name or "reducer" in name for name in trained)
    # The budget reaches the trainable copy of the reducer.
    for tokens in (4, 9):
        policy.num_tokens = tokens
        assert [part.shape[1] for part in seam_tokens(policy, batch)] == [tokens]


def seam_tokens(policy, batch):
    """Visual tokens that the trunk would get."""
    return policy.base.prepare_images(batch)[0]


def test_lora_targets_match_the_same_modules_as_in_the_base(grids_checkpoint):
    policy = GridsPolicy.from_pretrained(grids_checkpoint)
    ours, theirs = policy._get_default_peft_targets(), policy.base._get_default_peft_targets()

    def matched(root, pattern):
        return [name for name, _ in root.named_modules() if re.fullmatch(pattern, name)]

    expected = matched(policy.base, theirs["target_modules"])
    assert len(expected) > 0
    assert matched(policy, ours["target_modules"]) == [f"base.{name}" for name in expected]
    assert ours["modules_to_save"] == ["reducer"]


@pytest.mark.parametrize("kind", families())
def test_the_steps_of_a_flow_are_a_number_of_the_configuration(kind):
    defaults = {field.name: field.default for field in fields(PreTrainedConfig.get_choice_class(kind))}
    counted = {name for name in defaults if re.fullmatch(r"num_(\w+_)?(steps|timesteps)", name)}
    # So many times of the flow a training step draws for each sample.
    counted -= {"num_flow_timesteps"}
    field = get_family(kind).flow_steps
    # The only one that counts steps, or none of them does.
    assert counted == ({field} if field else set())
