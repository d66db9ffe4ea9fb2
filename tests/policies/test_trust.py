"""A checkpoint that somebody published cannot run code, reach other files or repositories, or exhaust memory.

Each case changes a good checkpoint as an attacker would, manifest included, and loads it both ways. Had code run, a
marker would exist; the first test shows that the same files do create it through LeRobot alone.
"""

import json
import shutil
import struct
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLConfig

from lerobot_grids.policies import load
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint.find import find_checkpoint, read_config
from lerobot_policy_grids.checkpoint.manifest import Base, read_manifest, verify_manifest, write_manifest
from lerobot_policy_grids.checkpoint.save import save_processors
from lerobot_policy_grids.checkpoint.trust import bound_of, check_processors, check_published
from lerobot_policy_grids.errors import CheckpointError, GridsError
from lerobot_policy_grids.families import families
from lerobot_policy_grids.families.molmoact2 import write_small_checkpoint
from lerobot_policy_grids.families.published_qwen import QWEN_2_5_VL_3B
from lerobot_policy_grids.families.small_qwen import write_small_processor
from lerobot_policy_grids.processor_grids import make_processors
from lerobot_policy_grids.tiny import VLM_FOLDER

PRE, POST, WEIGHTS = "policy_preprocessor.json", "policy_postprocessor.json", "model.safetensors"
STATE = "policy_preprocessor_step_5_normalizer_processor.safetensors"
MARKER = "MARKER"


def edit(name, change, folder):
    """Change a JSON file of the folder; MARKER in any text becomes the marker's path."""
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content).replace(MARKER, str(folder.parent / "marker")))


def config(**changes):
    return partial(edit, "config.json", lambda c: c.update(changes))


def reducer(**changes):
    return partial(edit, "config.json", lambda c: c["reducer"].update(changes))


def base(**changes):
    return partial(edit, "config.json", lambda c: c["base"].update(changes))


def add_step(**step):
    return partial(edit, PRE, lambda c: c["steps"].append(step))


def set_step(registry_name, **changes):
    def change(content):
        next(s for s in content["steps"] if s["registry_name"] == registry_name).update(changes)

    return partial(edit, PRE, change)


def write(name, data):
    def change(folder):
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return change


def link(name, target):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def weights(change):
    """Change the tensors."""

    def apply(folder):
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return apply


def cut(size):
    def change(folder):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[:size] if size <= 0 or size < len(data) else data + b"x")

    return change


def header(text, length=None):
    data = text.encode()
    return write(WEIGHTS, struct.pack("<Q", len(data) if length is None else length) + data)


def first(tensors):
    return sorted(tensors)[0]


def pickled(folder):
    class Evil:
        def __reduce__(self):
            return (open, (str(folder.parent / "marker"), "w"))

    torch.save({"weight": Evil()}, folder / WEIGHTS)


def nested(folder):
    (folder / "config.json").write_text('{"type": ' + "[" * 200_000 + "]" * 200_000 + "}")


OS_SYSTEM = {"class": "os.system", "config": {"command": f"touch {MARKER}"}}
POPEN = {"class": "subprocess.Popen", "config": {"args": ["touch", MARKER]}}
FAST = "action_tokenizer_processor"

HOSTILE = {
    # Code.
    "os.system": (add_step(**OS_SYSTEM), "can run code"),
    "Popen": (add_step(**POPEN), "can run code"),
    "class beside a good name": (add_step(registry_name="to_batch_processor", **POPEN), "can run code"),
    "class in the postprocessor": (partial(edit, POST, lambda c: c["steps"].append(POPEN)), "can run code"),
    "another family's tokenizer": (add_step(registry_name=FAST, config={}), "does not use"),
    "trust_remote_code elsewhere": (
        add_step(registry_name="tokenizer_processor", config={"tokenizer_name": "x/y", "trust_remote_code": True}),
        "has tokenizer_name, trust_remote_code",
    ),
    "another text tokenizer": (
        add_step(registry_name="tokenizer_processor", config={"tokenizer_name": "evil/repo"}),
        "tokenizer_name='evil/repo'",
    ),
    "a step of another policy": (
        add_step(registry_name="reward_classifier_processor", config={}),
        "'tiny_smolvla' does not use",
    ),
    "a step of another family": (add_step(registry_name="pi0_new_line_processor", config={}), "does not use"),
    "an unknown option": (set_step("to_batch_processor", config={"hook": "x"}), "expected no options"),
    "steps are no list": (partial(edit, PRE, lambda c: c.update(steps={})), "not a processor"),
    "a step is text": (partial(edit, PRE, lambda c: c["steps"].append("os.system")), "can run code"),
    "pickle as safetensors": (pickled, "cannot be read"),
    "peft": (config(use_peft=True), "use_peft"),
    # Other files and repositories.
    "state file outside": (set_step("normalizer_processor", state_file="../../x.safetensors"), "state_file"),
    "state file absolute": (set_step("normalizer_processor", state_file="/etc/passwd"), "state_file"),
    "state file not there": (
        set_step("normalizer_processor", state_file=STATE.replace("5", "9")),
        "expected a file beside",
    ),
    "linked config": (link("config.json", "/etc/passwd"), "not a file of its own folder"),
    "linked state": (link(STATE, "/etc/hostname"), "not a file of its own folder"),
    "linked weights": (link(WEIGHTS, "../other"), "not a file of its own folder"),
    "base path": (base(pretrained_path="/etc"), "pretrained_path"),
    "own path": (config(pretrained_path="evil/repo"), "pretrained_path"),
    "base revision": (base(pretrained_revision="main"), "pretrained_revision"),
    "vision-language model": (base(vlm_model_name="evil/repo"), "vlm_model_name"),
    "vision-language model, local": (base(vlm_model_name="../x"), "vlm_model_name"),
    # What is not a configuration.
    "type unknown": (config(type="evil"), "has type 'evil'"),
    "type missing": (partial(edit, "config.json", lambda c: c.pop("type")), "has type None"),
    "type a list": (config(type=["grids"]), "has type"),
    "base in base": (base(type="grids"), "no base policy"),
    "no base": (config(base=None), "no base policy"),
    "no reducer": (config(reducer=None), "has reducer None"),
    "reducer unknown": (reducer(type="evil"), "has reducer"),
    "a field of another reducer": (reducer(type="pool"), "does not know, condition_on"),
    "config a list": (write("config.json", "[1]"), "expected an object"),
    "config empty": (write("config.json", ""), "cannot be read as JSON"),
    "config nested": (nested, "nested"),
    "config too large": (write("config.json", b" " * (2**20 + 1)), "bytes, expected at most"),
    "processor nested": (write(PRE, '{"steps":' + "[" * 99 + "]" * 99 + "}"), "nested"),
    "processor no JSON": (write(POST, b"\xff\xfe"), "cannot be read as JSON"),
    "unknown field": (config(evil=1), "does not know, evil"),
    "text for a number": (reducer(num_tokens="16"), "num_tokens='16', expected int"),
    "truth for a number": (base(chunk_size=True), "chunk_size=True, expected int"),
    "a float for a whole number": (reducer(hidden_width=512.0), "hidden_width=512.0, expected int"),
    "text for an optional number": (reducer(num_tokens_max="36"), "num_tokens_max='36', expected int"),
    "text in a table of numbers": (reducer(camera_tokens={"a": "3"}), "camera_tokens={'a': '3'}, expected dict"),
    "text in a pair": (base(resize_imgs_with_padding=["96", 96]), "resize_imgs_with_padding=.* expected tuple"),
    "text in a feature": (
        partial(edit, "config.json", lambda c: c["input_features"]["observation.image"].update(shape=[3, "96", 96])),
        "input_features=.* expected dict",
    ),
    "truth for an optional number": (config(num_tokens=True), "num_tokens=True, expected int"),
    "infinity in JSON": (write("config.json", '{"type": "grids", "num_tokens": 1e999}'), "1e999 is too large"),
    "a key twice": (write("config.json", '{"type": "grids", "type": "pi0"}'), "'type' is there twice"),
    # Memory and time.
    "a large image": (base(resize_imgs_with_padding=[6400, 6400]), "resize_imgs_with_padding=6400, expected at most"),
    "an endless schedule": (
        config(schedule="linear", schedule_steps=10**12),
        "schedule_steps=10{12}, expected at",
    ),
    "a wide expert": (base(expert_width_multiplier=60000), "expert_width_multiplier=60000, expected at most"),
    "many layers": (base(num_vlm_layers=5000), "num_vlm_layers=5000, expected at most"),
    "a huge width": (reducer(hidden_width=10**9), "hidden_width=1000000000, expected at most"),
    "a huge dimension": (base(max_state_dim=10**9), "max_state_dim"),
    "a huge image": (
        partial(edit, "config.json", lambda c: c["input_features"]["observation.image"].update(shape=[3, 10**9, 1])),
        "input_features=1000000000",
    ),
    "a huge padding": (
        set_step("tiny_smolvla_tokenizer", config={"max_length": 10**9, "padding": "max_length"}),
        "max_length=1000000000",
    ),
    "a huge state": (lambda folder: (folder / STATE).open("r+b").truncate(65 * 2**20), "bytes, expected at most"),
    # Weights that do not fit.
    "no tensors": (weights(lambda t: {}), "missing"),
    "a tensor missing": (weights(lambda t: {k: v for k, v in t.items() if k != first(t)}), "missing"),
    "a tensor renamed": (weights(lambda t: {k + ("x" if k == first(t) else ""): v for k, v in t.items()}), "missing"),
    "another shape": (weights(lambda t: t | {first(t): torch.zeros(7)}), "has shape"),
    "another dtype": (weights(lambda t: t | {first(t): t[first(t)].to(torch.int8)}), "has dtype torch.int8"),
    "not a number": (weights(lambda t: t | {first(t): torch.full_like(t[first(t)], torch.nan)}), "NaN"),
    "infinity": (weights(lambda t: t | {first(t): torch.full_like(t[first(t)], torch.inf)}), "infinity"),
    "truncated": (cut(1000), "cannot be read"),
    "empty": (cut(0), "cannot be read"),
    "a byte too much": (cut(10**9), "cannot be read"),
    "a huge header": (header("{}", 2**63), "cannot be read"),
    "a hole": (
        header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}        '),
        "cannot be read",
    ),
    "a shape that overflows": (
        header('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}'),
        "cannot be read",
    ),
    # A base that cannot be trusted to be what it was.
    "base id is a path": (config(base_repo_id="/etc"), "base_repo_id"),
    "base id leaves": (config(base_repo_id="../../etc"), "base_repo_id"),
    "base id is a URL": (config(base_repo_id="https://evil/x"), "base_repo_id"),
    "base id is too long": (config(base_repo_id="a/b/c"), "base_repo_id"),
    "base id is home": (config(base_repo_id="~"), "base_repo_id"),
    "base at a branch": (config(base_revision="main"), "base_revision"),
}


# Of π0-FAST, whose action tokenizer comes with its own code.
CODE = {
    "another tokenizer's code": (
        add_step(registry_name=FAST, config={"action_tokenizer_name": "evil/repo", "trust_remote_code": True}),
        "action_tokenizer_name='evil/repo'",
    ),
    "a local folder's code": (
        add_step(registry_name=FAST, config={"action_tokenizer_name": MARKER}),
        "action_tokenizer_name=",
    ),
    "no tokenizer name": (add_step(registry_name=FAST, config={"trust_remote_code": True}), "lacks action_tokenizer"),
}


@pytest.fixture
def folder(grids_checkpoint, tmp_path):
    """A copy of a good checkpoint, as if pulled."""
    shutil.copytree(grids_checkpoint, tmp_path / "policy")
    write_manifest(tmp_path / "policy")
    return tmp_path / "policy"


def test_a_good_one_is_loaded(folder):
    GridsPolicy.from_pretrained(folder)
    load(str(folder))


@pytest.mark.parametrize("step", [OS_SYSTEM, POPEN])
def test_lerobot_alone_would_have_run_the_code(folder, step):
    loaded = read_config(folder)
    add_step(**step)(folder)
    with pytest.raises(Exception):  # noqa: B017, PT011 (after the harm is done)
        make_pre_post_processors(loaded, pretrained_path=str(folder))
    for _ in range(100):
        if (folder.parent / "marker").exists():
            break
        time.sleep(0.05)
    assert (folder.parent / "marker").exists()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_checkpoint_is_refused(folder, case, recwarn):
    change, message = HOSTILE[case]
    change(folder)
    if all(path.is_file() for path in folder.iterdir()):
        write_manifest(folder)
    for loader in (GridsPolicy.from_pretrained, load):
        with pytest.raises(GridsError, match=message) as caught:
            loader(folder)
        assert isinstance(caught.value, CheckpointError)
        assert str(folder) in str(caught.value)
        # A folder with this manifest is refused however it was downloaded.
        assert "hf download" not in str(caught.value)
    assert not (folder.parent / "marker").exists()


def test_a_dense_policys_processors_are_checked_when_they_are_read(dense_checkpoint, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(dense_checkpoint, folder)
    add_step(**OS_SYSTEM)(folder)
    write_manifest(folder)
    find_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match="can run code"):
        load(str(folder))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter_model.bin", "policy.pkl", "last.ckpt", "adapter_config.json"]
)
def test_other_files_are_never_opened(folder, name):
    pickled(folder / "..")
    (folder.parent / WEIGHTS).rename(folder / name)
    GridsPolicy.from_pretrained(folder)
    load(str(folder))
    assert not (folder.parent / "marker").exists()


# Fields that LeRobot would look up on the Hub, at the values that published checkpoints have.
LOOKED_UP = {"eo1": {"vlm_config": Qwen2_5_VLConfig(**QWEN_2_5_VL_3B).to_dict()}}


def test_no_bound_is_below_what_a_family_has():
    """Twice what the families' own configurations have is allowed."""
    for kind in families():
        content = PreTrainedConfig.get_choice_class(kind)(**LOOKED_UP.get(kind, {})).__dict__
        for name, value in content.items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, (int, float)):
                    assert 2 * number <= bound_of(name), (kind, name)


@pytest.mark.parametrize("name", ["base_repo_id", "base_revision"])
def test_an_adapters_configuration_names_the_base_of_its_manifest(folder, name):
    of_manifest = {"base_repo_id": "a/b", "base_revision": "0" * 40}
    config(**of_manifest)(folder)
    (folder / WEIGHTS).rename(folder / "grids_adapter.safetensors")
    write_manifest(folder, Base("a/b", "0" * 40, "f" * 64))
    check_published(folder)
    config(**(of_manifest | {name: {"base_repo_id": "c/d", "base_revision": "1" * 40}[name]}))(folder)
    write_manifest(folder, Base("a/b", "0" * 40, "f" * 64))
    with pytest.raises(CheckpointError, match=f"has {name}=.*, expected .* as in grids_manifest.json"):
        check_published(folder)


def test_an_adapters_base_must_be_pinned():
    for bad in (("a/b", "main", "f" * 64), ("a/../b", "0" * 40, "f" * 64), ("a/b", "0" * 40, "")):
        with pytest.raises(CheckpointError, match="cannot be trusted"):
            Base(*bad)


def test_the_hubs_cache_links_to_its_own_contents(folder, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    GridsPolicy.from_pretrained(snapshot)
    outside = tmp_path / "outside.json"
    (blobs / PRE).rename(outside)
    (snapshot / PRE).unlink()
    (snapshot / PRE).symlink_to(outside)
    with pytest.raises(CheckpointError, match="not a file of its own folder"):
        GridsPolicy.from_pretrained(snapshot)


@pytest.fixture
def any_tokenizer(monkeypatch, tmp_path_factory):
    """Where LeRobot would fetch a tokenizer from the Hub, it gets the one that ships here."""
    from lerobot.policies.eo1 import processor_eo1
    from lerobot.policies.molmoact2 import processor_molmoact2
    from lerobot.processor import tokenizer_processor
    from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor

    qwen = write_small_processor(tmp_path_factory.mktemp("qwen") / "files")

    class Shipped:
        @staticmethod
        def from_pretrained(name, **options):
            return AutoTokenizer.from_pretrained(VLM_FOLDER)

    class ShippedQwen:
        @staticmethod
        def from_pretrained(name, **options):
            return Qwen2_5_VLProcessor.from_pretrained(qwen)

    monkeypatch.setattr(tokenizer_processor, "AutoTokenizer", Shipped)
    monkeypatch.setattr(tokenizer_processor, "AutoProcessor", Shipped)
    monkeypatch.setattr(processor_eo1, "Qwen2_5_VLProcessor", ShippedQwen)
    molmo = str(write_small_checkpoint(tmp_path_factory.mktemp("molmoact2") / "files"))
    monkeypatch.setattr(processor_molmoact2, "_resolve_checkpoint_location", lambda *args, **options: molmo)
    actions = SimpleNamespace(from_pretrained_local=lambda name: None)
    monkeypatch.setattr(processor_molmoact2, "UniversalActionProcessor", actions)


def made(kind, folder):
    """A dense policy's configuration in a folder, and its fresh processors."""
    config = PreTrainedConfig.get_choice_class(kind)(device="cpu", **LOOKED_UP.get(kind, {}))
    if kind == "xvla":
        config.florence_config = {"vision_config": {}, "text_config": {}}
    config.input_features = {
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
    }
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    config.save_pretrained(folder)
    return make_processors(config)


@pytest.mark.parametrize("kind", families())
def test_the_families_own_processors_pass(kind, any_tokenizer, tmp_path):
    """What LeRobot writes for each family is on the lists, and names a tokenizer that the family has."""
    save_processors(tmp_path, *made(kind, tmp_path))
    check_published(tmp_path)
    check_processors(tmp_path)
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("inside", [False, True])
def test_attention_that_names_a_repository_is_refused(inside, any_tokenizer, tmp_path):
    """transformers would run its code."""
    made("eo1", tmp_path)
    stranger = {"attn_implementation": "somebody/kernels"}
    edit("config.json", lambda c: (c["vlm_config"]["text_config"] if inside else c).update(stranger), tmp_path)
    with pytest.raises(
        CheckpointError, match="has attn_implementation='somebody/kernels', expected one of None, eager"
    ):
        check_published(tmp_path)


BROUGHT = {"registry_name": "tokenizer_processor", "artifacts": {"tokenizer_name": "tokenizer"}}
BROUGHT |= {"config": {"tokenizer_name": "tokenizer", "max_length": 48}}


@pytest.fixture
def brought(tmp_path):
    """A checkpoint as newer LeRobot saves it, with its tokenizer in it."""
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(VLM_FOLDER / name, tmp_path / "tokenizer" / name)
    (tmp_path / "config.json").write_text('{"type": "smolvla"}')
    for name in (PRE, POST):
        (tmp_path / name).write_text('{"name": "x", "steps": []}')
    add_step(**BROUGHT)(tmp_path)
    return tmp_path


def test_a_tokenizer_may_come_along(brought):
    check_published(brought)
    check_processors(brought)
    (brought / WEIGHTS).write_bytes(b"x")
    write_manifest(brought)
    assert "tokenizer/tokenizer.json" in read_manifest(brought).files
    verify_manifest(brought)
    (brought / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer.json has \d+ bytes, expected"):
        verify_manifest(brought)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_step("tokenizer_processor", artifacts={"tokenizer_name": "../x"}), "has artifacts"),
        (set_step("tokenizer_processor", artifacts={"code": "tokenizer"}), "has artifacts"),
        (set_step("tokenizer_processor", config={"tokenizer_name": "evil/repo"}), "its tokenizer is 'evil/repo'"),
        (add_step(registry_name="to_batch_processor", artifacts={"tokenizer_name": "tokenizer"}), "has artifacts"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "with tokenizer_config.json in it"),
        (write("tokenizer/tokenizer_config.json", '{"auto_map": {"AutoTokenizer": "x.Y"}}'), "names code"),
        (write("tokenizer/evil.py", "print()"), "not a file of a tokenizer"),
        (link("tokenizer/tokenizer.json", "/etc/passwd"), "not a file of its own folder"),
    ],
)
def test_a_tokenizer_that_comes_along_brings_no_code(brought, change, message):
    change(brought)

    def check():
        check_published(brought)
        check_processors(brought)

    with pytest.raises(CheckpointError, match=message):
        check()


@pytest.mark.parametrize("case", CODE)
def test_code_of_another_action_tokenizer_is_refused(folder, case):
    change, message = CODE[case]
    write("config.json", '{"type": "pi0_fast"}')(folder)
    # The tiny policy's own tokenizer is no step of this family.
    partial(edit, PRE, lambda c: c.update(steps=[]))(folder)
    check_processors(folder)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        check_processors(folder)
