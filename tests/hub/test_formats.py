"""An adapter and its base are exactly the policy that was trained, or loading says what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import kept_results
from comparing import BASE, act, assert_same_bits, state_of
from lerobot_grids.hub.formats import write_adapter
from lerobot_grids.policies import load
from lerobot_grids.profiling.architectures import instantiate, make_config
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint.manifest import read_manifest, write_manifest
from lerobot_policy_grids.errors import CheckpointError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.reducers import reducer_config
from published import as_adapter, as_full


@pytest.fixture
def adapter(trained, tmp_path):
    return as_adapter(trained, tmp_path / "adapter")


def test_it_holds_the_reducer_alone_and_names_its_base(hub, adapter, trained):
    assert all(name.startswith("reducer.") for name in load_file(adapter / "grids_adapter.safetensors"))
    assert not (adapter / "model.safetensors").exists()
    base = read_manifest(adapter).base
    assert (base.repo_id, base.revision) == (BASE, hub.repositories[BASE].commits[0].oid)


@pytest.mark.parametrize("family", ["pi0", "smolvla"])
def test_at_real_size_it_is_under_two_percent_of_the_base(family):
    """As benchmarks/adapter_size.py measured it, of the reducer `mean`, which still has that size."""
    (measured,) = [line for line in kept_results.lines("adapter") if line["policy"] == family]
    dense = instantiate(make_config(family, measured["cameras"]), "meta")
    config = reducer_config("mean", num_tokens=measured["num_tokens"])
    reducer = config.build(get_family(dense.config.type).layout(dense))
    stored = {name: value.numel() for name, value in reducer.state_dict().items() if name != "schedule_step"}
    # The measured files also held the anchors, which are computed today.
    anchors = 2 * measured["num_tokens"]
    assert sum(stored.values()) + anchors == measured["adapter_parameters"]
    assert sum(parameter.numel() for parameter in dense.parameters()) == measured["base_parameters"]
    assert sum(measured["adapter_files"].values()) < 0.02 * measured["base_bytes"]


def test_it_is_the_policy_bit_for_bit(adapter, trained):
    policy, expected = GridsPolicy.from_pretrained(adapter), GridsPolicy.from_pretrained(trained)
    assert_same_bits(state_of(policy), state_of(expected))
    assert torch.equal(act(policy), act(expected))
    loaded = load(str(adapter))
    assert torch.equal(act(loaded.policy), act(expected))


def test_whatever_training_touched_is_stored(trained, tmp_path):
    """A merged low-rank adapter, one changed bit, and a zero that changed its sign."""
    tensors = load_file(trained / "model.safetensors")
    names = sorted(name for name in tensors if name.startswith("base.") and tensors[name].dim() == 2)[:3]
    tensors[names[0]] += 0.01 * torch.randn_like(tensors[names[0]])
    tensors[names[1]].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, trained / "model.safetensors")
    as_adapter(trained, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "grids_adapter.safetensors")
    assert sorted(name for name in stored if name.startswith("base.")) == names[:2]
    assert_same_bits(
        state_of(GridsPolicy.from_pretrained(tmp_path / "adapter")), state_of(GridsPolicy.from_pretrained(trained))
    )


def test_merging_gives_the_full_checkpoint_back(adapter, trained, tmp_path):
    as_full(adapter, tmp_path / "full")
    assert read_manifest(tmp_path / "full").format == "full"
    assert_same_bits(load_file(tmp_path / "full" / "model.safetensors"), load_file(trained / "model.safetensors"))
    assert torch.equal(act(GridsPolicy.from_pretrained(tmp_path / "full")), act(GridsPolicy.from_pretrained(trained)))
    assert (tmp_path / "full" / "config.json").read_bytes() == (trained / "config.json").read_bytes()
    # And back again.
    as_adapter(tmp_path / "full", tmp_path / "again")
    name = "grids_adapter.safetensors"
    assert_same_bits(load_file(tmp_path / "again" / name), load_file(adapter / name))


def test_an_adapter_needs_a_base_from_the_hub(grids_checkpoint, dense_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="not trained from a checkpoint on the Hub; give --format full"):
        write_adapter(grids_checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match="dense 'tiny_smolvla' policy"):
        write_adapter(dense_checkpoint, tmp_path)


def test_a_base_that_moved_does_not_matter(hub, adapter, trained, tmp_path):
    expected = act(GridsPolicy.from_pretrained(trained))
    repository = hub.repositories[BASE]
    repository.commit(dict.fromkeys(repository.commits[0].files, b"other"), "moved")
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(act(GridsPolicy.from_pretrained(adapter)), expected)


def test_a_cached_base_needs_no_network(hub, adapter, trained):
    expected = act(GridsPolicy.from_pretrained(trained))
    hub.requests.clear()
    hub.fail("HEAD", ".*", 503, 100)
    hub.fail("GET", ".*", 503, 100)
    assert torch.equal(act(GridsPolicy.from_pretrained(adapter)), expected)
    assert hub.requests == []


def test_a_folder_of_the_bases_name_is_not_used(hub, adapter, trained, tmp_path, monkeypatch):
    expected = act(GridsPolicy.from_pretrained(trained))
    (tmp_path / "cwd" / BASE).mkdir(parents=True)
    (tmp_path / "cwd" / BASE / "model.safetensors").write_bytes(b"other")
    monkeypatch.chdir(tmp_path / "cwd")
    assert torch.equal(act(GridsPolicy.from_pretrained(adapter)), expected)


def test_a_corrupted_base_is_named_with_both_fingerprints(hub, adapter, tmp_path):
    shutil.rmtree(tmp_path / "cache")
    hub.fail("GET", "resolve/.*/model.safetensors", "flipped")
    base = read_manifest(adapter).base
    with pytest.raises(CheckpointError, match=f"has SHA-256 [0-9a-f]{{64}}, but .*{base.sha256}") as caught:
        GridsPolicy.from_pretrained(adapter)
    assert BASE in str(caught.value)


def test_a_deleted_base_is_named(hub, adapter, tmp_path):
    shutil.rmtree(tmp_path / "cache")
    del hub.repositories[BASE]
    with pytest.raises(CheckpointError, match=f"base {BASE}@.* cannot be fetched: it does not exist.* --format full"):
        GridsPolicy.from_pretrained(adapter)


def test_a_rewritten_history_is_named(hub, adapter, tmp_path):
    shutil.rmtree(tmp_path / "cache")
    hub.repositories[BASE].commits[0].oid = "1" * 40
    with pytest.raises(CheckpointError, match="has no such revision"):
        GridsPolicy.from_pretrained(adapter)


def test_an_adapter_of_an_adapter_is_refused(hub, adapter, trained, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    for name, folder in (("lab/adapter", adapter), ("lab/full", trained)):
        revision = hub.add_folder(name, folder)
        changed = config | {"base_repo_id": name, "base_revision": revision}
        (trained / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=f"base {name}@{revision} is a 'grids' policy, expected a dense one"):
            write_adapter(trained, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: {k: v for k, v in t.items() if k != n}, "missing 'reducer"),
        (lambda t, n: t | {"reducer.more": torch.zeros(1)}, "unexpected 'reducer.more'"),
        (lambda t, n: t | {n: torch.zeros(9, 9)}, "has shape"),
        (lambda t, n: t | {n: torch.full_like(t[n], torch.nan)}, "NaN"),
        (lambda t, n: {}, "missing 'reducer"),
    ],
)
def test_an_adapter_fits_exactly_or_is_refused(adapter, change, message):
    path = adapter / "grids_adapter.safetensors"
    tensors = load_file(path)
    save_file(change(tensors, next(n for n in sorted(tensors) if n.endswith("weight"))), path)
    write_manifest(adapter, read_manifest(adapter).base)
    with pytest.raises(CheckpointError, match=message):
        GridsPolicy.from_pretrained(adapter)
