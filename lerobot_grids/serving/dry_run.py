"""What a robot would get, and how fast, without a robot: calls over gRPC with observations that are made up."""

import pickle
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from lerobot.transport.utils import grpc_channel_options, send_bytes_in_chunks

from .policy_server import GridsPolicyServer, upstream
from .robots import mock_robot
from .running import start_server

# Every call is over by then, or the dry run fails.
CALL_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class DryRun:
    """Latencies and the last action chunk.

    Attributes:
        requests: Number of observations that were sent.
        round_trip_ms: (p50, p95, largest) milliseconds from sending an observation to having its actions.
        server_ms: The same, of the server's part: processors and policy.
        policy_ms: The same, of the policy alone.
        joints: Names of the numbers of an action.
        actions: The last chunk, [t][joint], in the robot's units.
    """

    requests: int
    round_trip_ms: tuple[float, float, float]
    server_ms: tuple[float, float, float]
    policy_ms: tuple[float, float, float]
    joints: list[str]
    actions: list[list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return asdict(self)


def dry_run(servicer: GridsPolicyServer, task: str, requests: int) -> DryRun:
    """Act as a robot that does not move: connect, send observations, and take the actions.

    Args:
        servicer: The server, warm.
        task: The instruction.
        requests: Number of observations.
    """
    features, observation = mock_robot(servicer.loaded, task)
    endpoint = start_server(servicer, "127.0.0.1", 0)
    spent, chunk = [], []
    first = len(servicer.latencies_s)
    try:
        with upstream.grpc.insecure_channel(endpoint.address, grpc_channel_options()) as channel:
            stub = upstream.services_pb2_grpc.AsyncInferenceStub(channel)
            stub.Ready(upstream.services_pb2.Empty(), timeout=CALL_TIMEOUT_S)
            specs = upstream.RemotePolicyConfig(servicer.policy_type, servicer.name, features, servicer.chunk_size)
            stub.SendPolicyInstructions(upstream.services_pb2.PolicySetup(data=pickle.dumps(specs)))
            random = np.random.default_rng(1)
            for number in range(requests):
                for value in observation.values():
                    if isinstance(value, np.ndarray):
                        value[:] = random.integers(0, 256, value.shape, np.uint8)
                start = time.perf_counter()
                message = upstream.TimedObservation(time.time(), number, observation, must_go=True)
                parts = send_bytes_in_chunks(pickle.dumps(message), upstream.services_pb2.Observation)
                stub.SendObservations(parts, timeout=CALL_TIMEOUT_S)
                answer = stub.GetActions(upstream.services_pb2.Empty(), timeout=CALL_TIMEOUT_S)
                # This process's own server sent it.
                chunk = pickle.loads(answer.data)
                spent.append(time.perf_counter() - start)
    finally:
        endpoint.stop()
    timed = servicer.latencies_s[first:]
    actions = [action.get_action().tolist() for action in chunk]
    return DryRun(
        requests,
        summary_ms(spent),
        summary_ms([whole for whole, _ in timed]),
        summary_ms([policy for _, policy in timed]),
        servicer.joint_names(len(actions[0])),
        actions,
    )


def summary_ms(seconds: list[float]) -> tuple[float, float, float]:
    """(p50, p95, largest) in milliseconds."""
    values = 1000 * np.asarray(seconds)
    return float(np.percentile(values, 50)), float(np.percentile(values, 95)), float(values.max())
