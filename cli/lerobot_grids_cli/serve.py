"""lerobot-grids serve."""

from typing import Any, Literal

from .messages import OptionError
from .parser import require_at_least, run

LOCAL = "127.0.0.1"


def serve(
    policy: str,
    host: str = LOCAL,
    port: int = 8080,
    tokens: int | None = None,
    num_steps: int | None = None,
    runtime: Literal["auto", "eager", "fast", "compiled"] | None = None,
    quantise: Literal["none", "int8", "int8_dynamic"] | None = None,
    precision: Literal["own", "fp32", "tf32", "bf16"] | None = None,
    device: str | None = None,
    task: str = "",
    fps: int = 30,
    rename_map: dict[str, str] | None = None,
    dry_run: bool = False,
    requests: int = 20,
    json: str | None = None,
) -> None:
    """Answer LeRobot's robot_client: the policy runs here, the robot on another machine.

    The checkpoint is loaded once and warmed up before a robot connects. A robot whose cameras or joints do not fit is
    told so. Only this machine can connect unless --host says otherwise: LeRobot's protocol has no login and no
    encryption, so reach another machine through ssh -L, or a network that you trust. Ctrl-C ends it.

    Args:
        policy: Checkpoint folder, output folder of a training run, or Hub id; dense or grids.
        host: Address to listen on; 0.0.0.0 lets every machine that reaches this one connect.
        port: Port to listen on; 0 takes a free one.
        tokens: Visual tokens per camera of a grids checkpoint, up to the largest that it was trained for.
        num_steps: Integration steps of the flow for one action chunk. Defaults to the checkpoint's.
        runtime: How a grids policy acts: auto, eager, fast or compiled. auto is fast on a GPU. Defaults to the
            checkpoint's.
        quantise: Weights of trunk and action expert, with fast or compiled. Defaults to the checkpoint's.
        precision: Of products of float32, and with bf16 of the vision tower, with fast or compiled. Defaults to the
            checkpoint's.
        device: Device, such as cpu or cuda. Defaults to the checkpoint's, or to one that this machine has.
        task: Instruction to warm up with; the robot sends its own. Give the same where instructions are not padded.
        fps: Actions per second of the robot.
        rename_map: Names of the robot's features -> the policy's names. Defaults to those of the training.
        dry_run: Print latencies and actions for observations that are made up, and end. It needs no robot.
        requests: Number of observations of a dry run.
        json: JSON file for latencies, and for the actions of a dry run.

    Examples:
        lerobot-grids serve outputs/smolvla_base-16 --dry_run --task 'pick up the cube'
        lerobot-grids serve outputs/smolvla_base-16 --runtime fast --tokens 8
        lerobot-grids serve me/cube-16 --host 0.0.0.0 --port 8080
    """
    require_at_least(1, fps=fps, requests=requests)
    if not 0 <= port <= 65535:
        raise OptionError(f"--port {port}; give a port from 1 to 65535, or 0 for a free one")
    from pathlib import Path

    from rich.console import Console

    from lerobot_grids.console import require_writable, write_json
    from lerobot_grids.policies import flow_steps, load, token_counts
    from lerobot_grids.serving import GridsPolicyServer, is_loopback, start_server

    if json is not None:
        require_writable(Path(json))
    with Console(stderr=True).status("loading"):
        loaded = load(policy, device=device, num_tokens=tokens, num_steps=num_steps, rename_map=rename_map)
        _use_runtime(loaded.policy, policy, {"runtime": runtime, "quantise": quantise, "precision": precision})
        servicer = GridsPolicyServer(loaded, policy, fps=fps)
        seconds = servicer.warm_up(task)
    used, dense = token_counts(loaded.policy)
    tokens_used = "" if used is None else f", {used} of {dense} visual tokens per camera"
    steps = flow_steps(loaded.policy)
    flow = "" if steps is None else f", {steps} flow steps"
    print(f"{policy}: {servicer.policy_type}{tokens_used}{flow}, on {servicer.device}; warm after {seconds:.1f} s")
    if dry_run:
        _dry_run(servicer, policy, task, requests, json)
        return
    if not is_loopback(host):
        print(
            f"warning: whoever reaches {host}:{port} can use this policy and see what it sends, without a login; "
            "prefer --host 127.0.0.1 and ssh -L",
            flush=True,
        )
    endpoint = start_server(servicer, host, port)
    print(
        f"serving on {endpoint.address}; on the robot's machine: python -m lerobot.async_inference.robot_client "
        f"--server_address={endpoint.address} --policy_type={servicer.policy_type} --pretrained_name_or_path={policy} "
        f'--actions_per_chunk={servicer.chunk_size} --task="..." --robot.type=...',
        flush=True,
    )
    try:
        endpoint.server.wait_for_termination()
    except KeyboardInterrupt:
        pass
    finally:
        endpoint.stop()
        _report(servicer, policy, json, write_json)


def _use_runtime(policy: Any, name: str, options: dict[str, str | None]) -> None:
    """Act as these options say, and where they are None as the checkpoint says."""
    given = {option: value for option, value in options.items() if value is not None}
    if not given:
        return
    if not hasattr(policy, "use_runtime"):
        from lerobot_policy_grids.errors import GridsError

        raise GridsError(f"{name} is a dense policy, which only acts eagerly; drop --{next(iter(given))}")
    # What a checkpoint says of a fast runtime says nothing of the others.
    keeps = given.get("runtime") not in ("auto", "eager")
    policy.use_runtime(**({option: getattr(policy.config, option) for option in options if keeps} | given))


def _report(servicer: Any, policy: str, json: str | None, write_json: Any) -> None:
    """Say what was served."""
    from lerobot_grids.serving.dry_run import summary_ms

    timed = servicer.latencies_s
    content: dict[str, Any] = {"policy": policy, "chunks": len(timed)}
    line = f"served {len(timed)} action chunks"
    if timed:
        content |= {"server_ms": summary_ms([a for a, _ in timed]), "policy_ms": summary_ms([b for _, b in timed])}
        line += ", {:.0f} ms each (p50), {:.0f} ms (p95)".format(*content["server_ms"])
    print(line)
    write_json(json, content)


def _dry_run(servicer: Any, policy: str, task: str, requests: int, json: str | None) -> None:
    """Print latencies and actions."""
    from lerobot_grids.console import write_json
    from lerobot_grids.serving.dry_run import dry_run

    result = dry_run(servicer, task, requests)
    print(f"{requests} observations that are made up, over gRPC on this machine; milliseconds:")
    print(f"{'':<24}{'p50':>8}{'p95':>8}{'largest':>9}")
    for name, values in (
        ("as a robot sees it", result.round_trip_ms),
        ("server: all", result.server_ms),
        ("server: policy alone", result.policy_ms),
    ):
        print(f"{name:<24}{values[0]:>8.1f}{values[1]:>8.1f}{values[2]:>9.1f}")
    print(f"actions of the last chunk, first and last of {len(result.actions)}, which nothing was moved by:")
    for joint, first, last in zip(result.joints, result.actions[0], result.actions[-1], strict=True):
        print(f"{joint:<24}{first:>12.4f}{last:>12.4f}")
    write_json(json, {"policy": policy, **result.to_dict()})


def main(arguments: list[str]) -> None:
    """Run the subcommand."""
    run(serve, "serve", arguments, positional=True)
