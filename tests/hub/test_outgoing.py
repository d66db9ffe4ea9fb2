"""What leaves the machine: the card of what was measured, and nothing that says who or where."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from comparing import BASE
from lerobot_grids.hub import formats
from lerobot_grids.hub.prepare import Description
from lerobot_grids.hub.privacy import check_outgoing
from lerobot_grids.hub.pull import pull
from lerobot_grids.hub.push import push
from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.errors import DiskFullError, GridsError
from loopback_endpoints import TOKEN
from published import REPO


def test_nothing_says_who_or_where(hub, trained, tmp_path, capfd):
    config = json.loads((trained / "config.json").read_text())
    config["base"]["repo_id"] = "someone/else"
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
    with pytest.raises(GridsError, match="is not a result of eval, validate or bench"):
        push(trained, REPO, description=Description((tmp_path / "other.json",)), dry_run=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(hub, trained, monkeypatch):
    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(formats, "save_file", full)
    with pytest.raises(DiskFullError, match=r"a copy of .*pretrained_model for the push cannot be written: the disk"):
        push(trained, REPO)
    assert REPO not in hub.repositories
    assert [path.name for path in trained.parent.iterdir()] == ["pretrained_model"]


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


def statistics(change):
    """Change the statistics of the postprocessor."""

    def apply(folder):
        path = folder / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
        save_file(change(load_file(path)), path)

    return apply


old_prefix = statistics(lambda t: {f"so100.buffer.{name}": value for name, value in t.items()})


@pytest.mark.parametrize(
    "path",
    ["file:///home/x", "dir:/mnt/data", "~me/data", "~/data", "C:\\Users\\me", "C:/Users/me", "x:~/data", "=/a/b"],
)
def test_a_path_of_this_machine_is_found_in_any_spelling(tmp_path, path):
    (tmp_path / "config.json").write_text(json.dumps({"a": path}))
    with pytest.raises(GridsError, match="a path of this machine"):
        check_outgoing(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "me/data",
        "https://hub.co/me/data",
        "hf://me/x/y",
        r"base\.(?:.*\.layers\.\d+/x)",
        "29/30/1",
        "~29/30",
        "/",
        "a~/b",
    ],
)
def test_what_only_looks_like_a_path_may_go(tmp_path, text):
    (tmp_path / "config.json").write_text(json.dumps({"a": text}))
    (tmp_path / "README.md").write_text(f"{text} [{text}] `{text}`")
    check_outgoing(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison, "holds NaN or infinity"),
        (old_prefix, "pretrained_model/policy_postprocessor.json: .* has no '.*' of 'action'"),
        (statistics(lambda t: {name: value * 1e30 for name, value in t.items()}), "of 'action' that is not finite"),
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
