"""The endpoint that robots call."""

import ipaddress
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lerobot_policy_grids.errors import GridsError, first_line

from .policy_server import GridsPolicyServer, upstream

# Calls at the same time. A robot needs two; others are told that the server is busy.
CALLS = 8
OPTIONS = (
    # Otherwise a second server on the same port would get some of the calls.
    ("grpc.so_reuseport", 0),
    # A robot whose network is gone is noticed.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


@dataclass(frozen=True)
class Endpoint:
    """A server that runs.

    Attributes:
        server: The gRPC server.
        address: Where it is reached, `host:port`.
    """

    server: Any
    address: str

    def stop(self) -> None:
        """End it; calls that are in the middle are told so."""
        self.server.stop(grace=1).wait()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host name or address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def start_server(servicer: GridsPolicyServer, host: str, port: int) -> Endpoint:
    """Serve until `stop`.

    Args:
        servicer: Answers the calls.
        host: Name or address to listen on.
        port: Port to listen on; 0 takes a free one.

    Raises:
        GridsError: If it cannot listen there.
    """
    server = upstream.grpc.server(ThreadPoolExecutor(CALLS), options=OPTIONS, maximum_concurrent_rpcs=CALLS)
    upstream.services_pb2_grpc.add_AsyncInferenceServicer_to_server(servicer, server)
    named = f"[{host}]" if ":" in host and not host.startswith("[") else host
    try:
        bound = server.add_insecure_port(f"{named}:{port}")
    except RuntimeError as error:
        raise GridsError(
            f"cannot listen on {named}:{port} ({first_line(error)}); another program may have the port: give another "
            "--port, or an address of this machine as --host"
        ) from error
    server.start()
    return Endpoint(server, f"{named}:{bound}")
