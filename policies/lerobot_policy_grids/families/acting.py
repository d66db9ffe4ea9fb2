"""Acting in two phases: what flow-matching families share of it.

LeRobot's `predict_action_chunk` prepares images and hands them to `model.sample_actions`. With a fast runtime the
prepared images travel there as they are, together with the batch, and `sample_actions` is the runtime's: it runs the
phases, or LeRobot's own loop on reduced tokens. All around it, such as queues and the width of actions, is LeRobot's.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from ..errors import UnsupportedPolicyError
from ..runtime import FastRuntime, Observation
from ..runtime.buckets import to_bucket
from ..runtime.flow import integrate
from .seam import Seam

# LeRobot's arguments of real-time chunking.
GUIDANCE = ("inference_delay", "prev_chunk_left_over", "execution_horizon")


class Prepared(NamedTuple):
    """A policy's prepared images, each [b, 3, height, width], and its batch."""

    images: list[Tensor]
    batch: Mapping[str, Any]


def act_through(
    policy: Any, seam: Seam, runtime: FastRuntime, steps_field: str, reduce: Callable[[Prepared], list[Tensor]]
) -> None:
    """From now on a flow-matching policy acts through a runtime.

    Args:
        policy: LeRobot's.
        seam: Attached to it.
        runtime: Has its phases.
        steps_field: Field of the configuration that counts the denoising steps.
        reduce: Prepared images to the tokens that LeRobot's own loop gets.

    Raises:
        UnsupportedPolicyError: If LeRobot compiled that loop.
    """
    if "sample_actions" in vars(policy.model):
        raise UnsupportedPolicyError(
            "compile_model=true has LeRobot compile its own loop, which a fast runtime replaces; set it to false"
        )
    seam.runtime = runtime
    policy.model.sample_actions = partial(_sample_actions, policy, seam, runtime, steps_field, reduce)


def act_eagerly(model: Any, seam: Seam) -> None:
    """Undo `act_through`, given the module that does the policy's work. Harmless when it was not done."""
    if seam.runtime is not None:
        seam.runtime.forget()
        seam.runtime = None
        for loop in ("sample_actions", "generate_actions", "sample_actions_fast_kv_cache"):
            vars(model).pop(loop, None)


def _sample_actions(
    policy: Any,
    seam: Seam,
    runtime: FastRuntime,
    steps_field: str,
    reduce: Callable[[Prepared], list[Tensor]],
    prepared: Any,
    masks: list[Tensor],
    tokens: Tensor,
    token_mask: Tensor,
    *state: Tensor,
    noise: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """In place of the policy's `model.sample_actions`, whose arguments these are."""
    model, config = policy.model, policy.config
    own = type(model).sample_actions
    if not isinstance(prepared, Prepared):
        chunk: Tensor = own(model, prepared, masks, tokens, token_mask, *state, noise=noise, **options)
        return chunk
    if noise is None:
        noise = model.sample_noise((len(tokens), config.chunk_size, config.max_action_dim), tokens.device)
    cameras = seam.cameras_of(prepared.batch)
    steps = getattr(config, steps_field)
    if "num_steps" in signature(own).parameters:
        steps = options.get("num_steps") or steps

    def eager() -> Tensor:
        reduced = reduce(prepared)
        chunk: Tensor = own(model, reduced, masks[: len(reduced)], tokens, token_mask, *state, noise=noise, **options)
        return chunk

    observation = observe(prepared, masks, cameras, tokens, token_mask)
    # Guidance of real-time chunking works on velocities, so LeRobot's own loop can have ours.
    guided = model.rtc_processor is not None
    loop = partial(_guided, model, {name: options.get(name) for name in GUIDANCE}) if guided else integrate
    return runtime.chunk(observation, noise, cameras=cameras, steps=steps, eager=eager, loop=loop)


def observe(
    prepared: Prepared, masks: list[Tensor], cameras: list[int], tokens: Tensor, token_mask: Tensor
) -> Observation:
    """What the prefill gets of a policy's prepared images and its instruction, which is cut to a bucket.

    Args:
        prepared: Images and batch.
        masks: bool [b] of each image, whether it is real.
        cameras: Numbers of the cameras in the batch, whose images come first.
        tokens: int64 [b, l].
        token_mask: bool [b, l].
    """
    images = prepared.images[: len(cameras)]
    seen = torch.stack(masks[: len(cameras)], dim=1)
    return Observation(torch.cat(images), seen, *to_bucket(tokens, token_mask), _state(prepared.batch, images[0]))


class Draws:
    """The random draws of a loop, which both ways to act make from the same state.

    Args:
        device: On which the policy draws.
    """

    def __init__(self, device: torch.device) -> None:
        self._random: Any = torch if device.type in ("cpu", "meta") else torch.get_device_module(device)
        self._state = self._random.get_rng_state()

    def again(self) -> None:
        """The next draws are the first ones once more."""
        self._random.set_rng_state(self._state)


def _state(batch: Mapping[str, Any], like: Tensor) -> Tensor:
    state = batch.get(OBS_STATE)
    if state is None:
        return like.new_zeros(len(like), 0)
    return state[:, -1] if state.ndim > 2 else state


def _guided(model: Any, guidance: dict[str, Any], velocity: Any, noise: Tensor, numbers: Tensor) -> Tensor:
    """LeRobot's integration with real-time chunking, whose guidance wraps each velocity."""
    from lerobot.policies.common.flow_matching import euler_integrate

    steps = iter(numbers.split(1))

    def denoise(x_t: Tensor, time: Tensor) -> Tensor:
        # It may keep velocities, which the next step would overwrite.
        return velocity(x_t, next(steps)).clone()

    chunk: Tensor = euler_integrate(
        denoise,
        noise,
        len(numbers),
        rtc_processor=model.rtc_processor,
        rtc_enabled=model._rtc_enabled(),
        **guidance,
    )
    return chunk
