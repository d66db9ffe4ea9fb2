"""One row per VLA family: a tiny policy with random weights and a batch it accepts."""

import os
from abc import ABC, abstractmethod
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS

import mutants
import tiny_pi

BATCH = 3

# Set by test_mutants.py, which expects the suite to fail with each of them.
if "GRIDS_MUTANT" in os.environ:
    mutants.install(os.environ["GRIDS_MUTANT"])


class Family(ABC):
    """How the contract suite builds and drives one family."""

    image_size: int
    tokens_per_camera: int
    # When tokens can be dropped inside its trunk: "act", "train".
    pruned: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def build(self, options: dict[str, Any]) -> Any:
        """A dense policy with random weights, for these input and output features and other options."""

    @abstractmethod
    def batch(self, policy: Any) -> dict[str, Any]:
        """A batch as it comes from the policy's pre-processor; some instructions are shorter than others."""

    @abstractmethod
    def fix_noise(self, policy: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Fix every random draw of a dense policy: keyword arguments for (forward, predict_action_chunk)."""

    @abstractmethod
    def trunk(self, policy: Any) -> Any:
        """The module whose `forward` takes inputs_embeds=[prefix, suffix], attention_mask and position_ids."""

    # Further arguments of `policy` that make a bfloat16 one, where the family has such an option.
    bfloat16: ClassVar[dict[str, Any]] = {}

    def policy(self, cameras: int = 1, **options: Any) -> Any:
        """A dense policy in evaluation mode."""
        size = self.image_size
        inputs = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, size, size)) for i in range(cameras)}
        inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
        outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
        torch.manual_seed(0)
        return self.build({"input_features": inputs, "output_features": outputs, **options}).eval()

    def images(self, policy: Any) -> dict[str, Any]:
        """Random images, and states and actions that go with them."""
        torch.manual_seed(1)
        size, steps = self.image_size, policy.config.chunk_size
        batch: dict[str, Any] = {key: torch.rand(BATCH, 3, size, size) for key in policy.config.image_features}
        batch["observation.state"] = torch.randn(BATCH, 4)
        batch["action"] = torch.randn(BATCH, steps, 4)
        batch["action_is_pad"] = torch.zeros(BATCH, steps, dtype=torch.bool)
        batch["action_is_pad"][0, -3:] = True
        return batch

    def spy(self, policy: Any) -> list[Any]:
        """Collects (prefix length, mask bool [b, q, k], position ids) of each call that runs the whole prefix."""
        seen: list[Any] = []
        trunk = self.trunk(policy)

        def forward(*args: Any, **kwargs: Any) -> Any:
            prefix = kwargs["inputs_embeds"][0]
            if prefix is not None and kwargs["past_key_values"] is None:
                mask = kwargs["attention_mask"]
                # Some families hand over an additive mask with a head axis.
                mask = mask if mask.dtype == torch.bool else mask[:, 0] == 0
                seen.append((prefix.shape[1], mask, kwargs["position_ids"]))
            return type(trunk).forward(trunk, *args, **kwargs)

        # LeRobot calls `.forward` itself, which module hooks do not see.
        trunk.forward = forward
        return seen


class TinySmolVLA(Family):
    image_size, tokens_per_camera = 96, 144
    pruned: ClassVar = ("act", "train")

    def build(self, features):
        from lerobot_policy_grids import TinySmolVLAConfig
        from lerobot_policy_grids.modeling_grids import build

        return build(TinySmolVLAConfig(device="cpu", **features))

    def batch(self, policy):
        tasks = ["push the puck to the goal", "pick up the mug", "open the drawer quickly"]
        return make_pre_post_processors(policy.config)[0](self.images(policy) | {"task": tasks})

    def fix_noise(self, policy):
        noise = torch.randn(BATCH, policy.config.chunk_size, policy.config.max_action_dim)
        return {"noise": noise, "time": torch.linspace(0.2, 0.9, BATCH)}, {"noise": noise}

    def trunk(self, policy):
        return policy.model.vlm_with_expert


class Pi(Family):
    """π0 and π0.5: flow matching on PaliGemma."""

    image_size, tokens_per_camera = tiny_pi.IMAGE_SIZE, (tiny_pi.IMAGE_SIZE // tiny_pi.PATCH_SIZE) ** 2

    bfloat16: ClassVar = {"dtype": "bfloat16"}
    pruned: ClassVar = ("act",)

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind, self.options = kind, options

    def build(self, features):
        from lerobot.configs import PreTrainedConfig

        size = (self.image_size, self.image_size)
        common = {"chunk_size": 8, "n_action_steps": 8, "max_state_dim": 8, "max_action_dim": 8}
        options = common | {"image_resolution": size, "device": "cpu"} | self.options
        config = PreTrainedConfig.get_choice_class(self.kind)(**options, **features)
        module = import_module(f"lerobot.policies.{self.kind}.modeling_{self.kind}")
        from lerobot.policies.factory import get_policy_class

        with tiny_pi.tiny_sizes(module):
            policy = get_policy_class(self.kind)(config)
        # π0.5's time conditioning starts at zero, which closes every gate: the policy would be nearly blind.
        for name, parameter in policy.named_parameters():
            if name.endswith("layernorm.dense.weight") or name.endswith("norm.dense.weight"):
                torch.nn.init.normal_(parameter, std=0.3)
        return policy

    def batch(self, policy):
        batch = self.images(policy)
        batch["observation.language.tokens"] = torch.randint(5, 90, (BATCH, 8))
        mask = torch.ones(BATCH, 8, dtype=torch.bool)
        mask[1, -3:] = False
        batch["observation.language.attention_mask"] = mask
        return batch

    def fix_noise(self, policy):
        noise = torch.randn(BATCH, policy.config.chunk_size, policy.config.max_action_dim)
        policy.model.sample_noise = partial(_always, noise)
        policy.model.sample_time = partial(_always, torch.linspace(0.2, 0.9, BATCH))
        return {}, {"noise": noise}

    def trunk(self, policy):
        return policy.model.paligemma_with_expert


def _always(value, *args):
    return value


class PiFast(Pi):
    """π0-FAST: autoregressive action tokens on PaliGemma."""

    folder: Any
    pruned: ClassVar = ()

    def build(self, features):
        self.options |= {
            "text_tokenizer_name": str(tiny_pi.write_text_tokenizer(self.folder / "text")),
            "action_tokenizer_name": str(tiny_pi.write_fast_tokenizer(self.folder / "fast")),
            "max_decoding_steps": 5,
            "max_action_tokens": 6,
            "validate_action_token_prefix": False,
            "fast_skip_tokens": 2,
        }
        return super().build(features)

    def batch(self, policy):
        batch = super().batch(policy)
        batch[ACTION_TOKENS] = torch.randint(5, 90, (BATCH, 6))
        batch[ACTION_TOKEN_MASK] = torch.ones(BATCH, 6, dtype=torch.bool)
        return batch

    def fix_noise(self, policy):
        return {}, {}


FAMILIES: dict[str, Family] = {
    "tiny_smolvla": TinySmolVLA(),
    "pi0": Pi("pi0", num_inference_steps=3),
    "pi05": Pi("pi05", num_inference_steps=3),
    "pi0_fast": PiFast("pi0_fast"),
    "pi0_fast without cache": PiFast("pi0_fast", use_kv_cache=False),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, tmp_path_factory) -> Family:
    chosen = FAMILIES[request.param]
    chosen.folder = tmp_path_factory.mktemp("tokenizers")
    return chosen


def _families(wanted: Any) -> list[str]:
    return [name for name, family in FAMILIES.items() if wanted(family.pruned)]


@pytest.fixture(params=_families(lambda pruned: "act" in pruned))
def pruned_family(request) -> Family:
    """A family in whose trunk tokens can be dropped when it acts."""
    return FAMILIES[request.param]


@pytest.fixture(params=_families(lambda pruned: "train" in pruned))
def trained_family(request) -> Family:
    """A family in whose trunk they can be dropped in training, too."""
    return FAMILIES[request.param]


@pytest.fixture(params=_families(lambda pruned: pruned == ("act",)))
def acting_family(request) -> Family:
    """A family in whose trunk they can be dropped only when it acts."""
    return FAMILIES[request.param]
