"""A published checkpoint says what it consists of, and is refused when that is not what is there."""

import errno
import hashlib
import json
import shutil

import pytest
from lerobot.policies.pretrained import PreTrainedPolicy

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint.files import read_json
from lerobot_policy_grids.checkpoint.manifest import Base, read_manifest, verify_manifest, write_manifest
from lerobot_policy_grids.errors import CheckpointError, DiskFullError

BASE = Base("lerobot/smolvla_base", "0" * 40, "f" * 64)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder in all but content."""
    for name in ("config.json", "model.safetensors", "README.md", "notes.txt"):
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    return tmp_path


def test_it_lists_the_checkpoints_files_with_size_and_hash(folder):
    manifest = verify_manifest(folder)
    assert manifest.format == "full"
    assert set(manifest.files) == {"config.json", "model.safetensors"}
    record = manifest.files["config.json"]
    assert (record.size, record.sha256) == (11, hashlib.sha256(b"config.json").hexdigest())


def test_an_adapter_names_its_base(tmp_path):
    (tmp_path / "grids_adapter.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="adapter without grids_manifest"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, BASE)
    assert read_manifest(tmp_path).base == BASE
    assert read_manifest(tmp_path).format == "adapter"


def test_what_people_edit_or_add_does_not_matter(folder):
    (folder / "README.md").write_text("a better card")
    (folder / "notes.txt").unlink()
    verify_manifest(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.safetensors").write_text("Model.safetensors"), "has SHA-256 .*, expected .*--force"),
        (lambda f: (f / "model.safetensors").write_text("model"), "has 5 bytes, expected 17"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda f: (f / "policy_preprocessor.json").write_text("{}"), "policy_preprocessor.json.*does not list"),
    ],
)
def test_a_changed_folder_is_refused(folder, change, message):
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        verify_manifest(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"format_version": True},
        {"format": "adapter"},
        {"base": {"repo_id": "a/b"}},
        {"base": {"repo_id": "../..", "revision": "0" * 40, "sha256": "f" * 64}},
        {"base": {"repo_id": "a/b", "revision": "main", "sha256": "f" * 64}},
        {"base": {"repo_id": "/etc", "revision": "0" * 40, "sha256": "f" * 64}},
        {"base": {"repo_id": "a/b", "revision": "0" * 40, "sha256": None}},
        {"files": {"../../etc/passwd": {"size": 1, "sha256": "f" * 64}}},
        {"files": {"model.safetensors": {"size": "1", "sha256": "f" * 64}}},
        {"files": {"model.safetensors": {"size": 1, "sha256": 7}}},
        {"files": ["model.safetensors"]},
        {"files": {}},
    ],
)
def test_a_manifest_that_says_something_else_is_refused(folder, changes):
    path = folder / "grids_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds a JSON list, expected an object"),
        ("{", "cannot be read as JSON"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": [1e999]}', "1e999 is too large"),
        ('{"a": {"b": 1, "b": 2}}', "'b' is there twice"),
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested deeper"),
        ('"' + "x" * 2**20 + '"', "bytes, expected at most"),
    ],
)
def test_json_from_elsewhere_is_read_with_care(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "config.json")


def full_disk(policy, folder, **options):
    policy.config.save_pretrained(folder)
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_policy_is_checked_on_load_and_saved_anew_without_it(grids_checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "policy"
    shutil.copytree(grids_checkpoint, folder)
    write_manifest(folder)
    policy = GridsPolicy.from_pretrained(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="has SHA-256"):
        GridsPolicy.from_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedPolicy, "_save_pretrained", full_disk)
        with pytest.raises(DiskFullError, match=f"^{folder} cannot be written"):
            policy.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    policy.save_pretrained(folder)
    assert not (folder / "grids_manifest.json").exists()
    GridsPolicy.from_pretrained(folder)
