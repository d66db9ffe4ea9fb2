"""push -> pull -> act, on a Hub of this machine; and what goes wrong loses nothing."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from comparing import BASE, act, assert_same_bits, state_of
from lerobot_grids.hub import check_login, merge, parse_repository, pull, push
from lerobot_grids.publishing import Description
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.errors import CheckpointError, GridsError, HubError, OutputExistsError
from lerobot_policy_grids.manifest import sha256_of
from loopback_hub import READ_TOKEN, TOKEN

REPO = "me/push-16"
FULL = {
    "README.md",
    "config.json",
    "grids_manifest.json",
    "model.safetensors",
    "policy_postprocessor.json",
    "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
    "policy_preprocessor.json",
    "policy_preprocessor_step_5_normalizer_processor.safetensors",
}
ADAPTER = FULL - {"model.safetensors"} | {"grids_adapter.safetensors"}
KEPT = {".gitattributes"}


def on_hub(hub, name=REPO):
    return set(hub.files(name)) - KEPT


@pytest.mark.parametrize(("format", "files"), [("adapter", ADAPTER), ("full", FULL), ("auto", ADAPTER)])
def test_what_was_pushed_acts_the_same_bit_for_bit(hub, trained, tmp_path, format, files):
    pushed = push(trained, REPO, format=format)
    assert on_hub(hub) == set(pushed.files) == files
    pulled = pull(REPO, tmp_path / "pulled")
    assert pulled.commit == pushed.commit == hub.repositories[REPO].commits[-1].oid
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == files
    expected = GridsPolicy.from_pretrained(trained)
    for source in (tmp_path / "pulled", REPO, f"{REPO}@{pushed.commit}"):
        policy = GridsPolicy.from_pretrained(source)
        assert_same_bits(state_of(policy), state_of(expected))
        assert torch.equal(act(policy), act(expected))
    assert [path.name for path in trained.parent.iterdir()] == ["pretrained_model"]


def test_a_dense_policy_is_pushed_whole(hub, dense_checkpoint, tmp_path):
    assert push(dense_checkpoint, REPO).format == "full"
    pull(REPO, tmp_path / "pulled")
    assert_same_bits(
        load_file(tmp_path / "pulled" / "model.safetensors"), load_file(dense_checkpoint / "model.safetensors")
    )


def test_an_adapter_that_saves_little_is_not_worth_its_base(hub, trained):
    tensors = load_file(trained / "model.safetensors")
    save_file({k: v + 0.001 if v.is_floating_point() else v for k, v in tensors.items()}, trained / "model.safetensors")
    assert push(trained, REPO).format == "full"


def test_merging_what_was_pushed(hub, trained, tmp_path):
    push(trained, REPO, format="adapter")
    merge(REPO, tmp_path / "merged")
    assert torch.equal(act(GridsPolicy.from_pretrained(tmp_path / "merged")), act(GridsPolicy.from_pretrained(trained)))
    with pytest.raises(CheckpointError, match="full checkpoint already"):
        merge(str(tmp_path / "merged"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_second_push_is_one_commit_that_deletes_what_is_stale(hub, trained):
    push(trained, REPO, format="full")
    repository = hub.repositories[REPO]
    extra = {"train_config.json": b"{}", "video.mp4": b"kept", "notes/a.md": b"kept"}
    repository.commit(repository.commits[-1].files | extra, "by hand")
    before = len(repository.commits)
    pushed = push(trained, REPO, format="adapter")
    assert len(repository.commits) == before + 1
    assert sorted(pushed.deleted) == ["model.safetensors", "train_config.json"]
    assert on_hub(hub) == ADAPTER | {"video.mp4", "notes/a.md"}


def test_pushing_the_same_again_changes_nothing(hub, trained):
    push(trained, REPO)
    before = len(hub.repositories[REPO].commits)
    push(trained, REPO)
    assert len(hub.repositories[REPO].commits) == before


def test_a_dry_run_pushes_nothing(hub, trained):
    hub.requests.clear()
    pushed = push(trained, REPO, format="full", dry_run=True)
    assert set(pushed.files) == FULL
    assert pushed.commit is None
    assert "# push-16" in pushed.card
    assert hub.requests == []


def test_private_and_tags(hub, trained, tmp_path, monkeypatch):
    first = push(trained, REPO, private=True, tag="v1")
    assert hub.repositories[REPO].private
    assert hub.repositories[REPO].tags == {"v1": first.commit}
    push(trained, REPO, format="full")
    assert pull(f"{REPO}@v1", tmp_path / "v1").format == "adapter"
    assert pull(REPO, tmp_path / "main").format == "full"
    with pytest.raises(HubError, match="has a tag 'v1' already"):
        push(trained, REPO, tag="v1")
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="is private and you are not logged in"):
        pull(REPO, tmp_path / "anonymous")
    assert not (tmp_path / "anonymous").exists()


def test_a_public_repository_does_not_become_private_in_silence(hub, trained):
    push(trained, REPO)
    with pytest.raises(HubError, match="exists and is public"):
        push(trained, REPO, private=True)


# Refusals.


@pytest.mark.parametrize(
    ("token", "repository", "message"),
    [
        (TOKEN, "other/repo", "your token may not do that"),
        (READ_TOKEN, REPO, "your token may not do that"),
        ("hf_nobody", REPO, "your token is not valid"),
    ],
)
def test_who_may_not_push(hub, trained, monkeypatch, token, repository, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=f"{repository} cannot be pushed to: {message}") as caught:
        push(trained, repository)
    assert token not in str(caught.value)


@pytest.mark.parametrize("name", ["repo", "a/b/c", "../x", "/etc/x", "~/x", "https://hub/x", "me/a..b", "me/x y"])
def test_what_is_no_repository(name):
    with pytest.raises(HubError, match="is no repository"):
        parse_repository(name)


def test_a_push_names_no_revision(hub, trained):
    with pytest.raises(HubError, match="names a revision"):
        push(trained, f"{REPO}@v1")


def test_without_a_login_nothing_is_begun(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="hf auth login"):
        check_login(REPO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hub: hub.repositories.pop(REPO), "it does not exist, or is private"),
        (lambda hub: setattr(hub.repositories[REPO], "gated", True), "its owner must grant you access"),
        (lambda hub: hub.fail("GET", "api/models", 500, 9), "the Hub answered 500"),
    ],
)
def test_why_a_pull_failed_is_said(hub, trained, tmp_path, change, message):
    push(trained, REPO)
    change(hub)
    with pytest.raises(HubError, match=f"{REPO} cannot be pulled: {message}"):
        pull(REPO, tmp_path / "pulled")
    with pytest.raises(HubError, match="no such revision") if message.endswith("500") else pytest.raises(HubError):
        hub.faults.clear()
        pull(f"{REPO}@v9", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_an_unreachable_hub_is_said(trained, tmp_path, hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached; check the network"):
        pull(REPO, tmp_path / "pulled")


def test_an_existing_folder_is_kept_unless_forced(hub, trained, tmp_path):
    push(trained, REPO)
    (tmp_path / "pulled").mkdir()
    (tmp_path / "pulled" / "mine").touch()
    with pytest.raises(OutputExistsError, match="replace it with --force"):
        pull(REPO, tmp_path / "pulled")
    with pytest.raises(OutputExistsError, match="is no checkpoint, and --force replaces nothing else"):
        pull(REPO, tmp_path / "pulled", force=True)
    (tmp_path / "pulled" / "config.json").touch()
    pull(REPO, tmp_path / "pulled", force=True)
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == ADAPTER


# Faults.


def test_a_cut_body_is_fetched_again(hub, trained, tmp_path):
    push(trained, REPO, format="full")
    hub.fail("GET", "resolve/.*/model.safetensors", "cut")
    try:
        pull(REPO, tmp_path / "pulled")
    except HubError:
        pull(REPO, tmp_path / "pulled")
    assert torch.equal(act(GridsPolicy.from_pretrained(tmp_path / "pulled")), act(GridsPolicy.from_pretrained(trained)))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "policy_preprocessor.json", "grids_manifest.json"]
)
def test_a_flipped_byte_is_found_and_mended_by_force(hub, trained, tmp_path, name):
    push(trained, REPO, format="full")
    hub.fail("GET", f"resolve/.*/{name}", "flipped")
    with pytest.raises(CheckpointError, match=rf"{name} has hash .*--force"):
        pull(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    # The client keeps what it was given.
    with pytest.raises(CheckpointError, match="--force"):
        pull(REPO, tmp_path / "pulled")
    pull(REPO, tmp_path / "pulled", force=True)
    assert sha256_of(tmp_path / "pulled" / "model.safetensors") == sha256_of(trained / "model.safetensors")


def test_a_busy_hub_is_asked_again(hub, trained, tmp_path):
    push(trained, REPO)
    hub.fail("HEAD", "resolve", 503, 2)
    pull(REPO, tmp_path / "pulled")


def test_a_failed_commit_leaves_the_repository_as_it_was(hub, trained):
    push(trained, REPO, format="full")
    before = hub.repositories[REPO].commits[-1].oid
    hub.fail("POST", "/commit/", 500, 9)
    with pytest.raises(HubError, match="the Hub answered 500"):
        push(trained, REPO, format="adapter")
    assert hub.repositories[REPO].commits[-1].oid == before
    hub.faults.clear()
    hub.requests.clear()
    push(trained, REPO, format="adapter")
    assert on_hub(hub) == ADAPTER
    # What was uploaded already is not uploaded again.
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_a_failed_upload_leaves_the_repository_as_it_was(hub, trained):
    hub.fail("PUT", "/upload/", 400, 99)
    with pytest.raises(HubError):
        push(trained, REPO, format="full")
    assert on_hub(hub) == set()
    hub.faults.clear()
    push(trained, REPO, format="full")
    assert on_hub(hub) == FULL


def test_a_push_from_elsewhere_in_between_is_not_overwritten(hub, trained, monkeypatch):
    from huggingface_hub import HfApi

    push(trained, REPO)
    repository = hub.repositories[REPO]
    original = HfApi.create_commit

    def meanwhile(self, *args, **options):
        repository.commit(repository.commits[-1].files | {"video.mp4": b"theirs"}, "theirs")
        return original(self, *args, **options)

    monkeypatch.setattr(HfApi, "create_commit", meanwhile)
    with pytest.raises(HubError, match="somebody else changed the repository meanwhile"):
        push(trained, REPO, format="full")
    assert repository.commits[-1].message == "theirs"


# What leaves the machine.


def test_nothing_says_who_or_where(hub, trained, tmp_path, capfd):
    config = json.loads((trained / "config.json").read_text())
    config["repo_id"] = "someone/else"
    (trained / "config.json").write_text(json.dumps(config))
    fit = {
        "dataset": str(tmp_path / "data"),
        "policy": str(trained),
        "tokens": 16,
        "steps": 600,
        "model": {"train": "reducer"},
        "trainer": {"logger": {"init_args": {"save_dir": str(tmp_path)}}, "precision": "bf16-mixed"},
    }
    (trained.parent / "fit.yaml").write_text(yaml.dump(fit))
    for name in (".env", "wandb.json", "last.ckpt", "train_config.json", "events.out"):
        (trained / name).write_text(f"{TOKEN} {tmp_path}")
    result = write_result(trained, tmp_path)
    push(trained, REPO, description=Description((result,), "me/data", "apache-2.0"))
    everything = b"\n".join(hub.files(REPO).values())
    printed = "".join(capfd.readouterr())
    for secret in (TOKEN, str(tmp_path), "someone/else", "train_config"):
        assert secret.encode() not in everything
        assert secret not in printed
    card = hub.files(REPO)["README.md"].decode()
    assert "| steps | 600 |" in card
    assert "| model.train | reducer |" in card
    assert "| trainer.precision | bf16-mixed |" in card


def write_result(policy, folder):
    row = {"successes": 29, "episodes": 30, "interval": [0.83, 0.99], "seeds": [100, 129], "seconds": 1.0}
    content = {"policy": str(policy), "policy_type": "grids", "num_tokens": 16, "num_dense_tokens": 144}
    content |= {"tasks": [row | {"task": "push-v3"}], "total": row | {"task": "all"}}
    path = folder / "result.json"
    path.write_text(json.dumps(content))
    (folder / "looks.png").write_bytes(b"\x89PNG")
    return path


def test_the_card_shows_what_was_measured(hub, trained, tmp_path):
    result = write_result(trained, tmp_path)
    push(trained, REPO, description=Description((result,), "me/data", "apache-2.0"))
    card = hub.files(REPO)["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "lerobot"
    assert metadata["pipeline_tag"] == "robotics"
    assert metadata["base_model"] == BASE
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["datasets"] == ["me/data"]
    assert metadata["license"] == "apache-2.0"
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == round(29 / 30, 4)
    assert "| **this policy** | 16 | push-v3 | 29/30 | 97 % | 83 – 99 % | 100 to 129 |" in card  # noqa: RUF001
    assert "![Where it looks](looks.png)" in card
    assert "looks.png" in hub.files(REPO)
    GridsPolicy.from_pretrained(REPO)
    pull(REPO, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "looks.png").is_file()
    GridsPolicy.from_pretrained(tmp_path / "pulled")


def test_figures_of_another_policy_alone_are_refused(hub, trained, dense_checkpoint, tmp_path):
    result = write_result(dense_checkpoint, tmp_path)
    with pytest.raises(GridsError, match="has figures of dense, none of"):
        push(trained, REPO, description=Description((result,)), dry_run=True)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(GridsError, match="is no result of eval, validate or bench"):
        push(trained, REPO, description=Description((tmp_path / "other.json",)), dry_run=True)


def edit(name, **changes):
    def change(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return change


def steps(folder):
    path = folder / "policy_preprocessor.json"
    content = json.loads(path.read_text())
    content["steps"][0]["config"]["rename_map"] = {"/data/private/run": "x"}
    path.write_text(json.dumps(content))


def poison(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.startswith("reducer") and name.endswith("weight"))
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, folder / "model.safetensors")


def linked(folder):
    shutil.move(folder / "policy_preprocessor.json", folder.parent / "elsewhere.json")
    (folder / "policy_preprocessor.json").symlink_to(folder.parent / "elsewhere.json")


def described(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"from": "/data/private/run"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison, "holds NaN or infinity"),
        (linked, "holds links, policy_preprocessor.json"),
        (steps, "names /data/private/run, a path of this machine"),
        (described, "names /data/private/run, a path of this machine"),
        (edit("config.json", tags=[TOKEN]), "holds an access token"),
        (edit("config.json", evil=1), "pretrained_model/config.json has .* evil; others could not load it"),
        (lambda folder: (folder / "policy_postprocessor.json").unlink(), "lacks policy_postprocessor.json"),
    ],
)
def test_what_should_not_be_pushed_is_not(hub, trained, change, message):
    change(trained)
    with pytest.raises(GridsError, match=message) as caught:
        push(trained, REPO, format="full")
    assert TOKEN not in str(caught.value)
    assert REPO not in hub.repositories
    assert not [path for path in trained.parent.iterdir() if path.name.startswith(".")]


# Hostile repositories.


def test_a_repository_is_taken_by_its_names(hub, trained, tmp_path):
    push(trained, REPO)
    names = ("../../escape.json", "/etc/cron.d/x", "..\\x.json", ".git/config", "pytorch_model.bin", "a/config.json")
    repository = hub.repositories[REPO]
    repository.commit(repository.commits[-1].files | dict.fromkeys(names, b"evil"), "evil")
    pull(REPO, tmp_path / "deep" / "pulled")
    assert {path.name for path in (tmp_path / "deep" / "pulled").iterdir()} == ADAPTER
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]


def test_what_is_too_large_is_not_fetched(hub, trained, tmp_path):
    push(trained, REPO)
    repository = hub.repositories[REPO]
    repository.commit(repository.commits[-1].files | {"config.json": b" " * (2**20 + 1)}, "large")
    hub.requests.clear()
    with pytest.raises(CheckpointError, match=r"config\.json has 1048577 bytes"):
        pull(REPO, tmp_path / "pulled")
    assert not [request for request in hub.requests if "resolve" in request]


@pytest.mark.parametrize("load", ["pull", "from_pretrained"])
def test_code_in_a_repository_is_not_run(hub, trained, tmp_path, load):
    push(trained, REPO)
    repository, marker = hub.repositories[REPO], tmp_path / "marker"
    files = dict(repository.commits[-1].files)
    content = json.loads(files["policy_preprocessor.json"])
    content["steps"].append({"class": "os.system", "config": {"command": f"touch {marker}"}})
    files["policy_preprocessor.json"] = json.dumps(content).encode()
    repository.commit(files, "evil")
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="can run code"):
        pull(REPO, tmp_path / "pulled") if load == "pull" else GridsPolicy.from_pretrained(REPO)
    assert not marker.exists()
    assert not (tmp_path / "pulled").exists()
    assert all(REPO in request for request in hub.requests)
