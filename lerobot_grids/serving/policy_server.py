"""LeRobot's policy server with one policy, loaded before a robot connects, that says what is wrong.

LeRobot's own server loads what a client names, of a fixed list of types; unpickles what it gets; and answers an error
with silence, after which a robot that stands still is never given an action again. Here:

- the policy is the one that was loaded, and a robot that does not fit it is told so;
- messages are read by `unpickling`, bounded in size and time;
- an error reaches the client, and the next observation is tried again;
- one robot is served at a time, so that no robot gets another one's actions.
"""

import logging
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from lerobot_policy_grids.errors import GridsError, first_line

from ..policies import LoadedPolicy
from .robots import RobotError, RobotFeatures, action_names, match_robot, mock_robot, require_observation
from .unpickling import MessageError, loads
from .upstream import import_policy_server

upstream = import_policy_server()
PolicyServer: Any = upstream.PolicyServer
Code: Any = upstream.grpc.StatusCode
LOGGER = logging.getLogger(__name__)
# What LeRobot's server logs as an error is told to the robot, and said once.
LOGGER.setLevel(logging.CRITICAL)

# A robot that has not called for so long has left.
GONE_S = 10.0
# An observation may take so long to arrive, and so many bytes.
UPLOAD_S, LARGEST_UPLOAD = 20.0, 256 * 2**20
# The same line is not printed again for so long.
QUIET_S = 5.0


class GridsPolicyServer(PolicyServer):
    """Serves one policy to one robot at a time.

    Args:
        loaded: The policy with its processors, on its device.
        name: What to call it in messages.
        fps: Actions per second of the robot.
        queue_timeout_s: How long a client waits for actions where there is no new observation.

    Attributes:
        latencies_s: Seconds of each action chunk: from an observation to actions, and of these the policy's.
    """

    logger = LOGGER

    def __init__(self, loaded: LoadedPolicy, name: str, *, fps: int = 30, queue_timeout_s: float = 2.0) -> None:
        # Host and port are the endpoint's; LeRobot's server only reports them. It answers as soon as it can.
        super().__init__(upstream.PolicyServerConfig(fps=fps, inference_latency=0, obs_queue_timeout=queue_timeout_s))
        self.name = name
        self.loaded = loaded
        self.policy, self.preprocessor, self.postprocessor = loaded.policy, loaded.preprocessor, loaded.postprocessor
        self.device = str(next(loaded.policy.parameters()).device)
        self.policy_type = loaded.policy.config.type
        self.latencies_s: list[tuple[float, float]] = []
        self.lerobot_features: dict[str, Any] | None = None
        self._robot: RobotFeatures | None = None
        self._client: str | None = None
        self._seen = self._replied = -math.inf
        self._clients = threading.Lock()
        self._acting = threading.Lock()
        self._turn = threading.Lock()
        self._failure = ""
        self._in_policy_s = 0.0
        self._said: dict[str, float] = {}

    @property
    def chunk_size(self) -> int:
        """Actions in a chunk of the policy."""
        return int(getattr(self.policy.config, "chunk_size", 1))

    @property
    def policy_image_features(self) -> Any:
        return {} if self._robot is None else self._robot.images

    # What a client calls.

    def Ready(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A robot connects."""
        self._admit(context)
        self.say(f"{context.peer()} connected", always=True)
        with self._acting:
            self.policy.reset()
            self._robot = self.lerobot_features = self.last_processed_obs = None
            self._replied = time.monotonic()
        return super().Ready(request, context)

    def SendPolicyInstructions(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A robot says what it sends and what it wants."""
        self._admit(context)
        try:
            specs = loads(request.data)
            if not isinstance(specs, upstream.RemotePolicyConfig):
                raise MessageError(f"it is a {type(specs).__name__}, expected a RemotePolicyConfig")
            robot = self._accept(specs)
        except MessageError as error:
            self._refuse(context, Code.INVALID_ARGUMENT, f"the robot's instructions are refused: {error}")
        except RobotError as error:
            self._refuse(context, Code.FAILED_PRECONDITION, str(error))
        for line in robot.warnings:
            self.say(f"warning: {line}", always=True)
        self.lerobot_features, self._robot = robot.features, robot
        self.actions_per_chunk = specs.actions_per_chunk
        return upstream.services_pb2.Empty()

    def SendObservations(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        """A robot sends what it sees."""
        self._admit(context)
        if self._robot is None:
            line = (
                "this server has no instructions of the robot, perhaps because it was restarted; restart robot_client"
            )
            self._refuse(context, Code.FAILED_PRECONDITION, line)
        timer = threading.Timer(UPLOAD_S, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            return super().SendObservations(_bounded(request_iterator), context)
        except (MessageError, RobotError) as error:
            self._refuse(context, Code.INVALID_ARGUMENT, f"an observation is refused: {error}")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            line = f"an observation cannot be read: {type(error).__name__}: {first_line(error)}"
            self._refuse(context, Code.INVALID_ARGUMENT, line)
        finally:
            timer.cancel()

    def GetActions(self, request: Any, context: Any) -> Any:  # noqa: N802
        """A robot wants actions; the answer is empty where it has sent nothing new."""
        self._admit(context)
        with self._noticing_a_client_that_leaves(context), self._turn:
            self._failure = ""
            answer = super().GetActions(request, context)
            failure = self._failure
            self._seen = time.monotonic()
        if failure:
            self._refuse(context, Code.INTERNAL, failure)
        return answer

    # What LeRobot's server calls.

    def _enqueue_observation(self, obs: Any) -> bool:
        assert self._robot is not None
        require_observation(obs.get_observation(), self._robot)
        return bool(super()._enqueue_observation(obs))

    def _obs_sanity_checks(self, obs: Any, previous_obs: Any) -> bool:
        """Whether an observation is worth a new chunk.

        LeRobot's client asks for one with each observation until it has actions, but marks only the first as one that
        must be answered. If that one or its answer is lost, a robot that stands still would wait forever.
        """
        waits = time.monotonic() - self._replied > self.config.obs_queue_timeout
        return waits or bool(super()._obs_sanity_checks(obs, previous_obs))

    def _predict_action_chunk(self, observation_t: Any) -> Any:
        with self._acting:
            start = time.perf_counter()
            try:
                chunk = super()._predict_action_chunk(observation_t)
                if not all(bool(action.get_action().isfinite().all()) for action in chunk):
                    raise GridsError("the policy's action holds NaN or infinity; check the observation")
            except Exception as error:
                # The next observation is not compared with this one, and may have its number.
                self.last_processed_obs = None
                with self._predicted_timesteps_lock:
                    self._predicted_timesteps.discard(observation_t.get_timestep())
                kind = "" if isinstance(error, GridsError) else f"{type(error).__name__}: "
                self._failure = f"no actions: {kind}{first_line(error)}"
                raise
            self.latencies_s.append((time.perf_counter() - start, self._in_policy_s))
            self._replied = time.monotonic()
            return chunk

    def _get_action_chunk(self, observation: Any) -> Any:
        start = time.perf_counter()
        chunk = super()._get_action_chunk(observation)
        if chunk.is_cuda:
            torch.cuda.synchronize(chunk.device)
        self._in_policy_s = time.perf_counter() - start
        return chunk

    # Ours.

    def warm_up(self, task: str) -> float:
        """Act once on an observation that is made up; returns the seconds. Actions of a robot stay as they would be."""
        start = time.perf_counter()
        features, observation = mock_robot(self.loaded, task)
        robot = match_robot(self.loaded, features)
        with self._acting:
            batch = self.preprocessor(
                upstream.raw_observation_to_observation(observation, robot.features, robot.images)
            )
            if hasattr(self.policy, "warm_up"):
                self.policy.warm_up(batch)
            else:
                device = next(self.policy.parameters()).device
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    self.policy.predict_action_chunk(batch)
            self.policy.reset()
        return time.perf_counter() - start

    def joint_names(self, count: int) -> list[str]:
        """Names of the numbers of an action: the robot's, or the policy's."""
        state = (self.lerobot_features or {}).get("observation.state")
        return state["names"] if state and len(state["names"]) == count else action_names(self.loaded, count)

    def say(self, line: str, *, always: bool = False) -> None:
        """Print a line on standard error, the same line at most every few seconds."""
        now = time.monotonic()
        if not always and now - self._said.get(line, -math.inf) < QUIET_S:
            return
        if len(self._said) > 100:
            self._said.clear()
        self._said[line] = now
        # What a client sent must not reach the terminal as it is.
        print("".join(c if c.isprintable() else " " for c in line[:500]), file=sys.stderr, flush=True)

    def _accept(self, specs: Any) -> RobotFeatures:
        if specs.policy_type != self.policy_type:
            raise RobotError(
                f"the robot asks for a policy of type '{specs.policy_type[:40]}', and this server has {self.name}, of "
                f"type '{self.policy_type}'; give robot_client --policy_type={self.policy_type}"
            )
        if specs.rename_map and specs.rename_map != self.loaded.renames:
            raise RobotError("the robot sends a rename_map, which this server does not take; give it to serve")
        if not 1 <= specs.actions_per_chunk <= self.chunk_size:
            raise RobotError(
                f"the robot asks for {specs.actions_per_chunk} actions per chunk; the policy's chunks have "
                f"{self.chunk_size}, so give robot_client --actions_per_chunk from 1 to {self.chunk_size}"
            )
        if specs.pretrained_name_or_path != self.name:
            self.say(f"the robot asks for {specs.pretrained_name_or_path}; it gets {self.name}", always=True)
        return match_robot(self.loaded, specs.lerobot_features)

    def _admit(self, context: Any) -> None:
        """Let one robot in at a time."""
        peer, now = context.peer(), time.monotonic()
        with self._clients:
            is_other = self._client not in (None, peer)
            if not is_other or now - self._seen >= GONE_S:
                self._client, self._seen = peer, now
                return
        line = f"another robot is served ({self._client}); stop it, or wait {GONE_S:.0f} s after it was lost"
        self._refuse(context, Code.RESOURCE_EXHAUSTED, line)

    @contextmanager
    def _noticing_a_client_that_leaves(self, context: Any) -> Iterator[None]:
        """In this block the end of the call means that its client has gone: another may come at once."""
        answered = threading.Event()
        peer = context.peer()

        def ended() -> None:
            if not answered.is_set():
                with self._clients:
                    if self._client == peer:
                        self._client = None
                self.say(f"{peer} left", always=True)

        context.add_callback(ended)
        try:
            yield
        finally:
            answered.set()

    def _refuse(self, context: Any, code: Any, line: str) -> NoReturn:
        self.say(f"{context.peer()}: {line}")
        context.abort(code, line)
        raise AssertionError("abort raises")


def _bounded(messages: Iterable[Any]) -> Iterator[Any]:
    """Parts of an upload, up to a number of bytes."""
    size = 0
    for message in messages:
        size += len(message.data)
        if size > LARGEST_UPLOAD:
            raise MessageError(f"it has more than {LARGEST_UPLOAD // 2**20} MiB")
        yield message
