"""SHA-256 of files is remembered as long as they do not change."""

import hashlib
import os

import pytest
from huggingface_hub import constants

from lerobot_policy_grids.checkpoint import digests


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """Names of the files that were hashed, and a memory of its own."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    seen, hash_file = [], digests.sha256_of

    def spy(path):
        seen.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(digests, "sha256_of", spy)
    return seen


def test_a_file_is_hashed_once_until_it_changes(hashed, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    expected = hashlib.sha256(b"weights").hexdigest()
    assert [digests.digest_of(path) for _ in range(3)] == [expected] * 3
    assert hashed == ["model.safetensors"]
    os.link(path, tmp_path / "linked")
    assert digests.digest_of(tmp_path / "linked") == expected
    assert hashed == ["model.safetensors"]
    assert digests.digest_of(path, verify=True) == expected
    assert len(hashed) == 2
    path.write_bytes(b"Weights")
    assert digests.digest_of(path) == hashlib.sha256(b"Weights").hexdigest()
    assert len(hashed) == 3


@pytest.mark.parametrize("content", ["", "[]", "{", b"\xff"])
def test_a_memory_that_cannot_be_read_costs_time_alone(content, hashed, tmp_path):
    memory = tmp_path / "home" / "lerobot_grids" / "digests.json"
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content if isinstance(content, bytes) else content.encode())
    path = tmp_path / "x"
    path.write_bytes(b"x")
    for _ in range(2):
        assert digests.digest_of(path) == hashlib.sha256(b"x").hexdigest()
    assert hashed == ["x"]


def test_a_memory_that_cannot_be_written_costs_time_alone(hashed, tmp_path):
    (tmp_path / "home").write_text("a file where the folder should be")
    path = tmp_path / "x"
    path.write_bytes(b"x")
    assert digests.digest_of(path) == digests.digest_of(path)
    assert hashed == ["x", "x"]
