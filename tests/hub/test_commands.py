"""The installed wheel's commands in fresh processes; the unmodified client learns of the Hub from its environment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import installing
from comparing import act
from lerobot_grids_cli.main import main
from lerobot_policy_grids import GridsPolicy
from loopback_endpoints import TOKEN

REPO = "me/push-16"
HELPERS = str(Path(__file__).parents[1] / "helpers")
# With as many threads as the tests have: sums are rounded in another order with more.
ACT = """
import torch
from comparing import act
from lerobot_policy_grids import GridsPolicy
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.save([act(GridsPolicy.from_pretrained(source)) for source in sys.argv[2:]], sys.argv[1])
"""


@pytest.fixture
def shell(hub, installed, tmp_path):
    """Run a command of an environment that has the wheel alone; everything it printed is kept."""
    environment = installing.without_source() | hub.environment(tmp_path / "home")

    def find(name):
        # LeRobot's commands are borrowed: their own first line names the Python of the tests.
        own = installed / name
        return [own] if own.exists() else [installed / "python", Path(sys.executable).with_name(name)]

    class Shell:
        printed = ""

        def start(self, name, *arguments):
            return subprocess.Popen(
                [*find(name), *map(str, arguments)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                cwd=tmp_path,
            )

        def __call__(self, name, *arguments):
            with self.start(name, *arguments) as process:
                output = process.communicate(timeout=400)[0]
            self.printed += output
            assert process.returncode == 0, output[-4000:]
            return output

        def kill_at(self, request, name, *arguments):
            """Kill -9 as soon as the Hub sees a request."""
            hub.requests.clear()
            with self.start(name, *arguments) as process:
                for _ in range(4000):
                    if any(request in seen for seen in hub.requests) or process.poll() is not None:
                        break
                    time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
            assert process.returncode == -signal.SIGKILL
            hub.faults.clear()

    return Shell()


def test_push_pull_act_in_fresh_processes(hub, shell, installed, trained, tmp_path):
    """Killed while it pushes and while it pulls, then through; by our commands, LeRobot's, and from Python."""
    hub.fail("PUT", "/upload/", "never")
    shell.kill_at("PUT /upload/", "lerobot-grids", "push", trained.parent, REPO)
    assert set(hub.files(REPO)) == {".gitattributes"}
    output = shell("lerobot-grids", "push", trained.parent, REPO, "--tag", "v1", "--json", tmp_path / "pushed.json")
    commit = hub.repositories[REPO].commits[-1].oid
    assert f"adapter checkpoint, pushed to {REPO}@{commit}" in output
    assert json.loads((tmp_path / "pushed.json").read_text())["commit"] == commit
    assert [path.name for path in trained.parent.iterdir()] == ["pretrained_model"]

    hub.fail("GET", "resolve/.*/grids_adapter", "never")
    wanted = f"GET /{REPO}/resolve/{commit}/grids_adapter"
    shell.kill_at(wanted, "lerobot-grids", "pull", f"{REPO}@v1", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    leftovers = list((tmp_path / "home").rglob("*.incomplete"))
    assert leftovers
    for path in leftovers:
        os.utime(path, (0, 0))
    shell("lerobot-grids", "pull", f"{REPO}@v1", tmp_path / "pulled")
    assert not [path for path in leftovers if path.exists()]
    shell("lerobot-grids", "merge", tmp_path / "pulled", tmp_path / "merged")

    # Its base is in the cache now.
    hub.repositories.pop("lab/dense")
    program = tmp_path / "program.py"
    program.write_text(f"{installing.WHERE}\nsys.path.append({HELPERS!r})\n{ACT}")
    output = shell("python", program, tmp_path / "actions.pt", tmp_path / "pulled", tmp_path / "merged", REPO)
    assert str(installed.parent) in output.splitlines()
    expected = act(GridsPolicy.from_pretrained(trained))
    for actions in torch.load(tmp_path / "actions.pt", weights_only=True):
        assert torch.equal(actions, expected)

    shell(
        "lerobot-eval",
        f"--policy.path={REPO}",
        "--policy.device=cpu",
        "--env.discover_packages_path=lerobot_grids.simulation",
        "--env.type=grids_metaworld",
        "--env.task=push-v3",
        "--env.max_steps=9",
        "--env.render_interval=8",
        "--eval.n_episodes=1",
        "--eval.batch_size=1",
        f"--output_dir={tmp_path / 'eval'}",
    )
    assert json.loads((tmp_path / "eval" / "eval_info.json").read_text())["overall"]["n_episodes"] == 1
    assert TOKEN not in shell.printed
    pushed = b"".join(hub.files(REPO).values())
    assert TOKEN.encode() not in pushed
    assert str(tmp_path).encode() not in pushed


def test_a_dry_run_shows_the_files_and_the_card(hub, trained, capsys):
    assert main(["push", str(trained), REPO, "--dry-run", "--format", "full"]) == 0
    output = capsys.readouterr().out
    assert "# push-16" in output
    assert "library_name: lerobot" in output
    assert f"full checkpoint, would be pushed to {REPO}" in output
    assert REPO not in hub.repositories


def test_errors_are_one_line(hub, tmp_path, capsys):
    assert main(["pull", "nobody/nothing", str(tmp_path / "pulled")]) == 1
    output = "".join(capsys.readouterr())
    lines = [line for line in output.splitlines() if "error" in line]
    assert len(lines) == 1
    assert "nobody/nothing cannot be pulled: it does not exist, or is private" in lines[0]
    assert "Traceback" not in output
