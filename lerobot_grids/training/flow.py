"""Training for few integration steps of the flow.

A flow-matching policy learns velocities v(x, t) at x = t * noise + (1 - t) * actions, and acts by integrating them from
t = 1 to 0 in Euler steps. Two ways to make one or two steps enough:

- `biased_time` draws more of the training's times near the noise, after "Let It Be Simple" (Chen et al. 2026, arXiv
  2606.05737): no teacher and no further loss. The form of the bias is ours: t ** (1 / bias). LeRobot draws t from
  Beta(1.5, 1), so that is Beta(1.5 * bias, 1), whose density grows as t ** (1.5 * bias - 1).
- `OneStep` is self-distillation, after SnapFlow (Luan et al. 2026, arXiv 2604.05656): one step from noise should arrive
  where several steps arrive, v(noise, 1) = noise - actions. Here these are all steps that the teacher takes, or the
  policy itself; SnapFlow's are two of the policy itself. SnapFlow also embeds the time to arrive at, so that one
  network does both. Here nothing is added to the policy: its velocity at t = 1 becomes that of the whole way, and one
  step is what it should act with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.modeling_grids import acting_eagerly, dense_policy

from ..policies import flow_steps
from .distillation import Teacher, copied, watch


def flow_of(policy: Any) -> Any:
    """The module that draws noise and time of a policy's flow, and integrates it."""
    base = dense_policy(policy)
    return get_family(base.config.type).flow(base)


@contextmanager
def changed(flow: Any, **methods: Any) -> Iterator[None]:
    """In this block a flow has other methods: sample_noise=..., sample_time=..., sample_actions=..."""
    own = vars(flow)
    before = {name: own[name] for name in methods if name in own}
    own.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)


@contextmanager
def biased_time(policy: Any, bias: float) -> Iterator[None]:
    """In this block a policy draws t ** (1 / bias) where it would draw a time t: for a bias above 1 more noise."""
    flow = flow_of(policy)
    with changed(flow, sample_time=partial(_biased, flow.sample_time, bias)):
        yield


class Itself(Teacher):
    """The policy as it is, with the visual tokens that it has.

    Args:
        policy: Dense or grids.
    """

    description = "the policy itself, with more steps"

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    @contextmanager
    def dense(self) -> Iterator[Any]:
        base = dense_policy(self.policy)
        training = base.training
        base.eval()
        try:
            yield self.policy
        finally:
            base.train(training)

    def to(self, device: str | torch.device) -> None:
        pass


class OneStep:
    """Distance of one integration step to the end of several. Not an `nn.Module`, like teachers.

    Args:
        policy: Dense or grids.
        teacher: Takes the several steps, from the same noise. Defaults to the policy itself.

    Raises:
        GridsError: If the several steps are one.
        UnsupportedPolicyError: If the policy has no flow.
    """

    def __init__(self, policy: Any, teacher: Teacher | None = None) -> None:
        self.policy, self.teacher = policy, teacher or Itself(policy)
        self.flow = flow_of(policy)
        config = base_config(policy.config)
        self.target = get_family(config.type).target(dense_policy(policy))
        # [steps, width] of the noise that a chunk starts from.
        self.shape = (config.chunk_size, config.max_action_dim)
        if flow_steps(policy) == 1:
            raise GridsError("one_step: the policy takes one step already; drop it, or start from one that takes more")

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """The distance for a prepared batch, at the steps that lie in their episode, a scalar."""
        actions = batch["action"]
        noise = self.flow.sample_noise((len(actions), *self.shape), actions.device)
        goal = noise - self._several_steps(batch, noise)
        time = torch.ones(len(actions), dtype=torch.float32, device=actions.device)
        draws = {"sample_noise": partial(_given, noise), "sample_time": partial(_given, time)}
        with changed(self.flow, **draws), watch(self.target) as seen:
            self.policy.forward(copied(batch))
        return self.target.loss(seen[-1].output, goal, batch)

    def _several_steps(self, batch: dict[str, Any], noise: Tensor) -> Tensor:
        """Where several steps from this noise arrive, of its shape, without gradient."""
        ends: list[Tensor] = []
        with torch.no_grad(), self.teacher.dense() as policy, acting_eagerly(policy):
            flow = flow_of(policy)
            # What the policy returns is cut to the robot's joints, and in some policies turned into other units.
            with changed(flow, sample_actions=partial(_kept, flow.sample_actions, ends)):
                policy.predict_action_chunk(copied(batch), noise=noise)
        return ends[-1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "OneStep":
        return self


def _biased(draw: Any, bias: float, *args: Any, **kwargs: Any) -> Tensor:
    time: Tensor = draw(*args, **kwargs)
    return time ** (1 / bias)


def _given(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return value


def _kept(act: Any, ends: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    ends.append(act(*args, **kwargs))
    return ends[-1]
