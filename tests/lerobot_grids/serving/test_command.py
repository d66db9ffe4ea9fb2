"""lerobot-grids serve: addresses, the dry run, and what it refuses."""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("grpc")

from lerobot_grids.serving import is_loopback, start_server
from lerobot_grids_cli.main import main
from lerobot_grids_cli.serve import _use_runtime
from lerobot_policy_grids.errors import GridsError
from robot_caller import Caller, seen


def test_addresses():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.0.2", "::", "robot.local")))


def test_a_port_that_is_taken(server, endpoint):
    with pytest.raises(GridsError, match="another program may have the port"):
        start_server(server, "127.0.0.1", int(endpoint.address.rpartition(":")[2]))


def test_dry_run(checkpoint, tmp_path, capsys):
    file = tmp_path / "dry.json"
    flags = ["--dry_run", "--requests=2", "--tokens=4", "--runtime=fast", "--device=cpu", f"--json={file}"]
    assert main(["serve", str(checkpoint), *flags, "--precision=bf16"]) == 0
    out, err = capsys.readouterr()
    assert "runtime=fast precision=bf16: 2 cameras" in err
    assert "4 of 144 visual tokens per camera" in out
    assert "which nothing was moved by" in out
    result = json.loads(file.read_text())
    assert (np.shape(result["actions"]), result["requests"]) == ((16, 4), 2)
    assert 0 < result["policy_ms"][0] <= result["server_ms"][0] <= result["round_trip_ms"][0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("fast", "int8", "tf32")),
        ({"runtime": "fast"}, ("fast", "int8", "tf32")),
        ({"runtime": "compiled", "precision": "bf16"}, ("compiled", "int8", "bf16")),
        ({"quantise": "none"}, ("fast", "none", "tf32")),
        ({"runtime": "eager"}, ("eager", "none", "own")),
        ({"runtime": "auto"}, ("auto", "none", "own")),
    ],
)
def test_options_that_are_not_given_are_the_checkpoints(loaded, given, expected):
    policy = loaded.policy
    policy.use_runtime("fast", "int8", "tf32")
    try:
        _use_runtime(policy, "served", dict.fromkeys(("runtime", "quantise", "precision")) | given)
        config = policy.config
        assert (config.runtime, config.quantise, config.precision) == expected
        with pytest.raises(GridsError, match="served is a dense policy, which only acts eagerly; drop --precision"):
            _use_runtime(policy.base, "served", {"runtime": None, "precision": "bf16"})
    finally:
        policy.use_runtime("eager")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_serve_until_ctrl_c(checkpoint, tmp_path, capsys, monkeypatch, host):
    from lerobot_grids import serving

    listening = []

    def start_and_press(servicer, *address):
        endpoint = start_server(servicer, "127.0.0.1", 0)
        robot = Caller(endpoint.address).ready().instruct()
        listening.append((address, robot.send(seen()).actions()))

        def press():
            raise KeyboardInterrupt

        monkeypatch.setattr(endpoint.server, "wait_for_termination", press)
        return endpoint

    monkeypatch.setattr(serving, "start_server", start_and_press)
    file = tmp_path / "served.json"
    assert main(["serve", str(checkpoint), f"--host={host}", "--port=0", "--device=cpu", f"--json={file}"]) == 0
    ((address, actions),) = listening
    assert (address, actions.shape) == ((host, 0), (16, 4))
    out = capsys.readouterr().out
    assert ("without a login" in out) == (host == "0.0.0.0")
    assert "--policy_type=grids" in out
    assert "served 1 action chunks" in out
    assert json.loads(file.read_text())["chunks"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--port=70000"], "--port 70000"), (["--tokens=99"], "1 .. 36"), (["--runtime=fest"], "auto, eager, fast")],
)
def test_serve_refuses(checkpoint, capsys, flags, message):
    # What the parser refuses ends the program.
    with pytest.raises(SystemExit) as stop:
        sys.exit(main(["serve", str(checkpoint), *flags]))
    assert stop.value.code in (1, 2)
    assert message in capsys.readouterr().err
