"""The doctor: each fault of a machine, a policy or a dataset is one line with what to do."""

import json
import shutil
import sys
from importlib.metadata import distributions
from types import SimpleNamespace

import psutil
import pytest
import torch
from huggingface_hub import constants

from lerobot_grids.doctor import Check, environment, hub, media, packages, plan_checks, run_checks
from lerobot_grids.doctor.dataset_plan import DatasetPlan
from lerobot_grids.doctor.policy_plan import PolicyPlan
from lerobot_grids.policies.starting import configure
from lerobot_grids_cli.main import main

GIB = 2**30
TOKEN = "hf_averysecrettoken"


def only(checks):
    (check,) = checks
    return check


def test_a_check_that_raises_is_a_failure_and_the_next_one_runs():
    def broken():
        yield Check("ok", "First", "fine")
        raise OSError("libfoo.so: cannot open\nmore lines")

    checks = list(run_checks([("Broken", broken), ("Python", environment.check_python)]))
    assert [(check.status, check.name) for check in checks] == [("ok", "First"), ("fail", "Broken"), ("ok", "Python")]
    assert checks[1].text.startswith("Broken: OSError: libfoo.so: cannot open; ")


@pytest.mark.parametrize(
    ("release", "status", "advice"),
    [("0.6.1", "ok", ""), ("0.5.4", "fail", "lerobot>=0.6.0"), ("0.9.0", "warn", "lerobot<=0.6.2")],
)
def test_lerobot(monkeypatch, release, status, advice):
    monkeypatch.setattr(environment, "version", lambda name: release)
    check = only(environment.check_lerobot())
    assert (check.status, advice in check.advice) == (status, True)


@pytest.mark.parametrize(
    ("driver", "cuda", "status", "advice"),
    [
        (False, "13.0", "warn", "too slowly"),
        (True, None, "fail", "torch with CUDA"),
        (True, "13.0", "fail", "update the NVIDIA driver"),
    ],
)
def test_a_machine_without_a_usable_gpu(monkeypatch, driver, cuda, status, advice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(environment, "_has_nvidia", lambda: driver)
    _, gpu = environment.check_torch()
    assert (gpu.name, gpu.status) == ("GPU", status)
    assert advice in gpu.advice


def test_a_gpu_that_torch_was_not_built_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GTX 3")

    def ones(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(torch, "ones", ones)
    _, gpu = environment.check_torch()
    assert gpu.status == "fail"
    assert "no kernel image" in gpu.seen
    assert "Compile" not in gpu.text


def test_little_memory_and_a_container_without_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=GIB, total=8 * GIB))
    monkeypatch.setattr(environment, "SHARED", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 * 2**20, free=64 * 2**20))
    memory, shared = environment.check_memory()
    assert (memory.status, shared.status) == ("warn", "warn")
    assert "64 MiB" in shared.seen
    assert "--shm-size" in shared.advice
    assert only(environment.check_disk()).status == "fail"


def test_the_plugin_of_this_installation_is_found():
    checks = list(packages.check_plugin())
    assert all(check.status != "fail" for check in checks), checks


def other_name(name):
    """This project's distribution as another tool would have named it."""
    found = next(d for d in distributions() if d.metadata["Name"] == "lerobot_policy_grids")
    return SimpleNamespace(metadata={"Name": name}, version=found.version, locate_file=found.locate_file)


@pytest.mark.parametrize(
    ("installed", "seen"),
    [([], "no folder on PYTHONPATH"), (["lerobot-policy-grids"], "and LeRobot looks for lerobot_policy_grids")],
)
def test_why_lerobot_does_not_find_the_plugin(monkeypatch, installed, seen):
    monkeypatch.setattr(packages, "distributions", lambda: [other_name(name) for name in installed])
    check = only(packages.check_plugin())
    assert check.status == "fail"
    assert seen in check.seen


def test_a_plugin_that_lerobot_cannot_import(monkeypatch):
    monkeypatch.setattr(packages, "distributions", lambda: [other_name("lerobot_policy_grids")])

    def fails(name):
        raise ImportError("cannot import name 'PolicyFeature'")

    monkeypatch.setattr(packages, "import_module", fails)
    check = only(packages.check_plugin())
    assert check.status == "fail"
    assert "cannot import name 'PolicyFeature'" in check.seen


def fake_distribution(requires, extras=()):
    metadata = SimpleNamespace(get_all=lambda key: list(extras))
    return SimpleNamespace(requires=requires, metadata=metadata)


def test_extras_are_read_through_those_that_they_name(monkeypatch):
    """As `pi` asks for `lerobot[pi]`, which asks for more."""
    installed = {
        "ours": fake_distribution(
            ["torch", 'lerobot[pi]; extra == "pi"', 'other[x]; extra == "sim"'], ("pi", "sim", "dev")
        ),
        "lerobot": fake_distribution(['transformers>=5; extra == "pi"', 'scipy; extra == "other"']),
        "transformers": SimpleNamespace(version="4.0", requires=[]),
    }
    installed["lerobot"].version = "0.6.1"

    def found(name):
        if name not in installed:
            raise packages.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(packages, "distribution", found)
    assert list(packages.missing(installed["ours"], "pi")) == ["transformers is 4.0, expected >=5"]
    assert list(packages.missing(installed["ours"], "sim")) == ["other"]
    monkeypatch.setattr(packages, "PLUGIN", "ours")
    none, wrong = packages.check_extras()
    assert none.status == wrong.status == "warn"
    assert "transformers is 4.0" in wrong.seen


@pytest.mark.parametrize(
    ("message", "advice"),
    [("OSError: libavutil.so.60: cannot open\n" * 50, "FFmpeg"), ("undefined symbol: torch", "belongs to this torch")],
)
def test_torchcodec_without_what_it_needs_is_one_line(monkeypatch, message, advice):
    def load(name):
        if name == "torchcodec":
            raise RuntimeError(message)

    monkeypatch.setattr(media, "find_spec", lambda name: True)
    monkeypatch.setattr(media, "import_module", load)
    check = only(media.check_video())
    assert check.status == "warn"
    assert "pyav" in check.seen
    assert advice in check.advice
    assert "\n" not in check.text
    monkeypatch.setattr(media, "import_module", lambda name: (_ for _ in ()).throw(OSError("no")))
    assert only(media.check_video()).status == "fail"


@pytest.mark.parametrize("asked", [None, "osmesa"])
def test_opengl_that_gives_no_context(monkeypatch, asked):
    """As where libEGL is installed and no driver is."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    if asked:
        monkeypatch.setenv("MUJOCO_GL", asked)
    monkeypatch.setattr(media, "find_library", lambda name: "lib" if name == "EGL" else None)
    monkeypatch.setattr(media, "CONTEXT", "import sys; sys.exit('no display')")
    check = only(media.check_opengl())
    assert check.status == "warn"
    assert f"{asked or 'egl'} gives no context (no display)" in check.seen
    assert ("unset MUJOCO_GL" in check.advice) == bool(asked)
    monkeypatch.setattr(media, "CONTEXT", "print('context')")
    assert only(media.check_opengl()).status == "ok"


@pytest.fixture
def answering(monkeypatch):
    """A client of the Hub, which answers what is asked of it."""
    import huggingface_hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def answer(status=200, content=None, error=None):
        def get(url, headers, timeout):
            assert timeout <= hub.TIMEOUT_S
            if error is not None:
                raise error
            return SimpleNamespace(status_code=status, json=lambda: content)

        monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(get=get))
        return only(hub.check_hub())

    return answer


def test_the_hub_answers(answering, monkeypatch):
    me = {"name": "me", "auth": {"accessToken": {"role": "read"}}}
    check = answering(content=me)
    assert check.status == "ok"
    assert "logged in as me" in check.seen
    assert "can write" in check.advice
    assert answering(401).advice == hub.LOGIN
    assert "503" in answering(503).seen
    # A token with a line break in it is repeated by the client's own error.
    check = answering(error=ValueError(f"Illegal header value b'Bearer {TOKEN}\\n'"))
    assert check.status == "warn"
    assert TOKEN not in check.text
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    assert "nobody is logged in" in answering(content=[]).seen
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in answering().seen


def test_a_hub_that_never_answers_is_waited_for_only_so_long(monkeypatch):
    import threading

    never = threading.Event()
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.05)
    assert hub.in_time(lambda: (never.wait(30), None), 0.05) is None
    never.set()


# A policy and a dataset.


# Those that do not predict a training step, which takes seconds.
QUICK = ("Dataset", "Numbers", "Policy", "Cameras", "Fit")


def plan(policy=None, dataset=None, tokens=None, rename_map=None, batch_size=None, gpu_memory=None, names=None):
    arguments = (policy and str(policy), dataset and str(dataset), tokens, rename_map or {}, batch_size, gpu_memory)
    return list(run_checks(check for check in plan_checks(*arguments) if names is None or check[0] in names))


def test_what_fits_is_said_to_fit(dataset):
    checks = plan("tiny", dataset, 24)
    assert [check.status for check in checks] == ["ok"] * len(checks), checks
    said = {check.name: check.seen for check in checks}
    assert "6 episodes, 144 frames at 10 per second; state 4, action 4" in said["Dataset"]
    assert said["Cameras"] == "observation.image -> observation.image"
    assert "24 of 144" in said["Tokens"]
    assert "--model.train all" in said["Training"]


def test_cameras_that_do_not_match_name_the_option(dense_checkpoint, two_camera_dataset):
    checks = plan(dense_checkpoint, two_camera_dataset, names=QUICK)
    errors = [check.text for check in checks if check.status == "fail"]
    assert len(errors) == 1
    assert '--rename_map \'{"observation.images.top": "observation.image"}\'' in errors[0]
    renamed = {"observation.images.top": "observation.image"}
    checks = plan(dense_checkpoint, two_camera_dataset, rename_map=renamed, names=QUICK)
    assert [check for check in checks if check.status == "fail"] == []
    cameras = next(check for check in checks if check.name == "Cameras")
    assert cameras.seen == "observation.images.top -> observation.image"


@pytest.fixture
def spoiled(dataset, tmp_path):
    """A copy of the dataset with other statistics."""

    def spoil(change):
        folder = tmp_path / "data"
        shutil.copytree(dataset, folder)
        path = folder / "meta" / "stats.json"
        statistics = json.loads(path.read_text())
        change(statistics)
        path.write_text(json.dumps(statistics))
        return folder

    return spoil


def test_no_quantiles_for_pi05(spoiled):
    """LeRobot's command that adds them is named, and the whole of it is known from the metadata."""

    def drop(statistics):
        for kinds in statistics.values():
            for name in [name for name in kinds if name.startswith("q")]:
                del kinds[name]

    data = DatasetPlan(str(spoiled(drop)), {})
    assert only(data.check()).status == "ok"
    policy = PolicyPlan("pi05", None, data, None, None)
    # Without the real size, which takes seconds to build.
    policy.config, policy.findings = configure("pi05", None, data.features)
    policy.dense = policy.config
    errors = [check.text for check in policy.check_data() if check.status == "fail"]
    assert len(errors) == 1
    assert "augment_dataset_quantile_stats" in errors[0]
    assert not policy.fits


def test_nan_in_the_statistics(spoiled):
    def nan(statistics):
        statistics["action"]["mean"][0] = float("nan")

    errors = [check.text for check in plan("tiny", spoiled(nan), names=QUICK) if check.status == "fail"]
    assert any("'mean' of 'action' that is not finite" in error for error in errors)


def test_wrong_names_are_one_line_each(tmp_path):
    checks = plan("pi9", tmp_path / "nothing")
    assert [(check.name, check.status) for check in checks] == [("Dataset", "fail"), ("Policy", "fail")]
    assert "does not exist" in checks[0].seen
    assert "'pi9' is unknown" in checks[1].seen


def test_a_budget_above_the_dense_tokens():
    errors = [check for check in plan("tiny", tokens=145) if check.status == "fail"]
    assert len(errors) == 1
    assert "12 x 12 = 144" in errors[0].seen


def test_a_gpu_that_is_too_small_and_one_that_is_not():
    """A fraction of a GiB stands for a GPU: the policy is small."""
    *_, last, _ = plan("tiny", tokens=16, batch_size=64, gpu_memory=0.02)
    assert (last.name, last.status) == ("Training", "fail")
    ok = next(check for check in plan("tiny", tokens=16, batch_size=64, gpu_memory=1) if check.name == "Training")
    assert ok.status == "ok"
    assert "a GPU of 1 GiB" in ok.seen


def test_a_step_that_cannot_be_predicted_is_not_said_to_fit_nowhere(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("the step depends on a value")

    monkeypatch.setattr("lerobot_grids.training.step_cost.predict_step", refuse)
    seen = [check for check in plan("tiny", tokens=16) if check.name == "Training"]
    assert {check.status for check in seen} == {"warn"}
    assert "no way could be predicted" in seen[-1].seen


def test_the_command(tmp_path, capsys, monkeypatch, dataset):
    from lerobot_grids import doctor

    monkeypatch.setattr(doctor, "MACHINE", (("Python", environment.check_python),))
    file = tmp_path / "doctor.json"
    assert main(["doctor", f"--dataset={dataset}", f"--json={file}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok    ") for line in lines[:-1])
    assert lines[-1] == "3 ok, 0 warnings, 0 failures"
    assert [check["name"] for check in json.loads(file.read_text())["checks"]] == ["Python", "Dataset", "Numbers"]
    with pytest.raises(SystemExit) as stop:
        main(["doctor", f"--dataset={tmp_path / 'nothing'}"])
    assert stop.value.code == 1
    assert "fail  Dataset" in capsys.readouterr().out
    assert main(["doctor", "--tokens=16"]) == 1
    assert "--tokens 16 without --policy" in capsys.readouterr().err


def test_it_runs_where_torch_and_lerobot_cannot_be_imported():
    """Whoever needs a doctor has a broken environment."""
    import subprocess

    code = (
        "import sys\n"
        "for name in ('torch', 'lerobot', 'av', 'torchcodec'): sys.modules[name] = None\n"
        "from lerobot_grids_cli.main import main\n"
        "main(['doctor'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    failed = [line.split(":")[0].split()[-1] for line in result.stdout.splitlines() if line.startswith("fail")]
    assert failed == ["LeRobot", "torch", "Plugin", "Video"]
