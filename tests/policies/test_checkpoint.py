"""A folder is whole or absent, and weights fit exactly or are refused."""

import errno
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from lerobot_policy_grids.checkpoint import find
from lerobot_policy_grids.checkpoint.atomic import atomic_file, atomic_files, atomic_folder
from lerobot_policy_grids.checkpoint.find import find_checkpoint, provenance, resolve_checkpoint
from lerobot_policy_grids.checkpoint.weights import load_weights
from lerobot_policy_grids.errors import CheckpointError, DiskFullError, OutputExistsError


def test_a_finished_folder_appears_whole(tmp_path):
    target = tmp_path / "a" / "out"
    with atomic_folder(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["one"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    def write():
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "one").write_text("1")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(OutputExistsError, match="already exists"), atomic_folder(tmp_path / "out"):
        pass
    with atomic_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").touch()
        assert (tmp_path / "out" / "old").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]


def test_a_killed_writer_leaves_the_old_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    code = (
        "import time, sys; from pathlib import Path; from lerobot_policy_grids.checkpoint import atomic_folder\n"
        f"with atomic_folder(Path({str(tmp_path / 'out')!r}), replace=True) as folder:\n"
        "    (folder / 'new').touch(); print('writing', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]


def test_what_killed_writers_left_is_cleared_up_or_put_back(tmp_path):
    dead = 2**22 + 1  # above any process number
    (tmp_path / f".out.partial-{dead}").mkdir()
    (tmp_path / f".out.old-{dead}").mkdir()
    (tmp_path / f".out.old-{dead}" / "precious").touch()
    (tmp_path / ".out.partial-1").mkdir()  # its writer lives
    with pytest.raises(OutputExistsError, match="already exists"), atomic_folder(tmp_path / "out"):
        pass
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial-1", "out"]


def test_a_rename_that_fails_loses_nothing(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    original = Path.rename

    def rename(self, target):
        if "partial" in self.name:
            raise OSError("no space left on device")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no space"), atomic_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device", "x"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
]


@pytest.mark.parametrize("error", FULL_DISK, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("writer", [atomic_file, atomic_files, partial(atomic_folder, replace=True)])
def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path, writer, error):
    target = tmp_path / "out"
    if writer is atomic_file:
        target.write_text("old")
    else:
        target.mkdir()
        (target / "old").touch()
    before = sorted(tmp_path.rglob("*"))

    def write():
        with writer(target) as hidden:
            (hidden if writer is atomic_file else hidden / "new").write_text("half")
            raise error

    with pytest.raises(DiskFullError, match=r"out.* cannot be written: the disk .* is full \([\d,]+ MiB .*make room"):
        write()
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_do_not_name_hidden_paths(tmp_path):
    def write(error):
        with atomic_folder(tmp_path / "out") as folder:
            raise error(folder / "config.json")

    for error in (
        lambda path: CheckpointError(f"{path} is damaged"),
        lambda path: OSError(errno.EIO, "I/O", str(path)),
    ):
        with pytest.raises((CheckpointError, OSError)) as caught:
            write(error)
        assert f"{tmp_path}/out/config.json" in str(caught.value)
        assert "partial" not in str(caught.value)


def test_of_two_writers_at_once_the_second_is_refused(tmp_path):
    def second():
        with atomic_folder(tmp_path / "out") as slow:
            (slow / "slow").touch()
            with atomic_folder(tmp_path / "out") as fast:
                (fast / "fast").touch()

    with pytest.raises(OutputExistsError, match="already exists"):
        second()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fast"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("stored", "wanted"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_values_take_the_modules_precision(stored, wanted, tmp_path):
    source = nn.Linear(3, 2).to(stored)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    module = nn.Linear(3, 2).to(wanted)
    load_weights(module, tmp_path / "w.safetensors")
    assert module.weight.dtype == wanted
    assert torch.equal(module.weight, source.weight.to(wanted))


def test_names_of_older_files_are_mapped(tmp_path):
    source = nn.Linear(3, 2)
    save_file({"old.weight": source.weight, "bias": source.bias, "gone": torch.zeros(1)}, tmp_path / "w.safetensors")
    module = nn.Linear(3, 2)
    load_weights(module, tmp_path / "w.safetensors", lambda names: {"weight": "old.weight", "bias": "bias"})
    assert torch.equal(module.weight, source.weight)


def test_tied_weights_are_no_missing_keys(tmp_path):
    from safetensors.torch import save_model

    def tied():
        module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        module[1].weight = module[0].weight
        return module

    source, module = tied(), tied()
    save_model(source, tmp_path / "w.safetensors")
    load_weights(module, tmp_path / "w.safetensors")
    assert torch.equal(module[1].weight, source[0].weight)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(2, 3)}, "missing 'bias'"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)}, "unexpected 'more'"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, r"shape \(3, 2\), expected \(2, 3\)"),
        ({"weight": torch.zeros(2, 3, dtype=torch.int8), "bias": torch.zeros(2)}, "dtype torch.int8"),
        ({"weight": torch.zeros(2, 3, dtype=torch.float64), "bias": torch.zeros(2)}, "dtype torch.float64"),
        ({"weight": torch.full((2, 3), torch.inf), "bias": torch.zeros(2)}, "NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(nn.Linear(3, 2), tmp_path / "w.safetensors")
    assert str(tmp_path / "w.safetensors") in str(caught.value)


def test_a_hub_id_is_fetched_at_its_revision(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    calls = []
    fetch = lambda repository, **options: calls.append((repository, options["revision"])) or str(tmp_path)  # noqa: E731
    monkeypatch.setattr(find, "snapshot_download", fetch)
    assert find_checkpoint("me/policy") == tmp_path
    assert find_checkpoint("me/policy@0123abc") == tmp_path
    assert calls == [("me/policy", None), ("me/policy", "0123abc")]


def test_a_cached_snapshot_knows_where_it_came_from(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert provenance(tmp_path / "models--me--my--policy" / "snapshots" / commit) == ("me/my--policy", commit)
    assert provenance(tmp_path / "outputs" / "run") is None


@pytest.mark.parametrize("error", [RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError])
def test_what_the_hub_refuses_is_named(error, monkeypatch):
    def fetch(*args, **options):
        raise error(
            "404 the server's own words", response=httpx.Response(404, request=httpx.Request("GET", "http://x"))
        )

    monkeypatch.setattr(find, "snapshot_download", fetch)
    with pytest.raises(CheckpointError, match=r"me/policy@main is not a folder.*server's own words"):
        find_checkpoint("me/policy@main")


def test_a_run_folder_means_its_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "pretrained_model").mkdir()
    (tmp_path / "pretrained_model" / "config.json").write_text("{}")
    assert resolve_checkpoint(tmp_path) == tmp_path / "pretrained_model"
    with pytest.raises(CheckpointError, match="is not a folder"):
        resolve_checkpoint(tmp_path / "nothing")
