"""One row per VLA family: a tiny policy with random weights and a batch it accepts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature

BATCH, TASKS = 3, ["push the puck to the goal", "pick up the mug", "open the drawer quickly"]


@dataclass(frozen=True)
class Family:
    """How the contract suite builds and drives one family."""

    make_config: Callable[[dict[str, Any], dict[str, Any]], Any]
    tokens_per_camera: int
    # Extra arguments that fix every random draw of the loss: (config, action shape) -> keyword arguments.
    fixed_noise: Callable[[Any], dict[str, Any]]
    # (policy) -> the list that collects (prefix length, pad masks, position ids) of each trunk call.
    spy: Callable[[Any], list[Any]]

    def policy(self, cameras: int = 1) -> Any:
        """A dense policy in evaluation mode."""
        from lerobot_policy_grids.modeling_grids import build_base

        inputs = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)) for i in range(cameras)}
        inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
        outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
        torch.manual_seed(0)
        return build_base(self.make_config(inputs, outputs)).eval()

    def batch(self, policy: Any) -> dict[str, Any]:
        """A pre-processed batch."""
        from lerobot.policies.factory import make_pre_post_processors

        torch.manual_seed(1)
        raw: dict[str, Any] = {key: torch.rand(BATCH, 3, 96, 96) for key in policy.config.image_features}
        steps = policy.config.chunk_size
        raw["observation.state"] = torch.randn(BATCH, 4)
        raw["action"] = torch.randn(BATCH, steps, 4)
        raw["action_is_pad"] = torch.zeros(BATCH, steps, dtype=torch.bool)
        raw["action_is_pad"][0, -3:] = True
        raw["task"] = TASKS
        return make_pre_post_processors(policy.config)[0](raw)


def _tiny_smolvla(inputs, outputs):
    from lerobot_policy_grids import TinySmolVLAConfig

    return TinySmolVLAConfig(input_features=inputs, output_features=outputs, device="cpu")


def _flow_noise(config):
    generator = torch.Generator().manual_seed(2)
    return {
        "noise": torch.randn(BATCH, config.chunk_size, config.max_action_dim, generator=generator),
        "time": torch.linspace(0.2, 0.9, BATCH),
    }


def _spy_smolvla(policy):
    seen = []

    def before(module, args, kwargs):
        # Prefix-only or prefix + suffix calls carry prefix embeddings first.
        prefix = kwargs["inputs_embeds"][0]
        if prefix is not None:
            seen.append((prefix.shape[1], kwargs["attention_mask"], kwargs["position_ids"]))

    inner = policy.model.vlm_with_expert
    original = type(inner).forward

    def forward(*args, **kwargs):
        before(inner, args, kwargs)
        return original(inner, *args, **kwargs)

    # LeRobot calls `.forward` itself, which module hooks do not see.
    inner.forward = forward
    return seen


FAMILIES = {
    "tiny_smolvla": Family(_tiny_smolvla, tokens_per_camera=144, fixed_noise=_flow_noise, spy=_spy_smolvla),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request) -> Family:
    return FAMILIES[request.param]
