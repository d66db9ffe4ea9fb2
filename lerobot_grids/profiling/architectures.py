"""Policies at their real dimensions with random weights, built without a network.

On the "meta" device they take no memory and compute no values: enough to count FLOPs.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn

from lerobot_policy_grids.adapters import get_adapter
from lerobot_policy_grids.errors import UnsupportedPolicyError
from lerobot_policy_grids.modeling_grids import build
from lerobot_policy_grids.tiny.tokenizer import VLM_FOLDER

# Family -> (LeRobot policy type, side of the square image in pixels, instruction tokens after padding).
FAMILIES = {
    "pi0": ("pi0", 224, 48),
    "pi05": ("pi05", 224, 200),
    "pi0_fast": ("pi0_fast", 224, 200),
    "smolvla": ("smolvla", 512, 48),
    "tiny": ("tiny_smolvla", 96, 32),
}
STATE_SIZE = ACTION_SIZE = 14
# Sizes that LeRobot would fetch from the Hub.
SMOLVLM2_500M = Path(__file__).parent / "smolvlm2_500m.json"


def make_config(family: str, cameras: int, size: int | None = None, dtype: str = "bfloat16") -> PreTrainedConfig:
    """The configuration of a family's default architecture.

    Args:
        family: One of `FAMILIES`.
        cameras: Number of cameras.
        size: Side of the square image in pixels; None takes the family's own.
        dtype: "bfloat16" or "float32", for families that have the choice.

    Raises:
        UnsupportedPolicyError: If the family is unknown.
    """
    if family not in FAMILIES:
        raise UnsupportedPolicyError(f"'{family}' is no architecture known here; choose from {', '.join(FAMILIES)}")
    kind, own_size, _ = FAMILIES[family]
    size = own_size if size is None else size
    inputs = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, size, size)) for i in range(cameras)}
    inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (STATE_SIZE,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (ACTION_SIZE,))}
    options: dict[str, Any] = {"device": "cpu", "input_features": inputs, "output_features": outputs}
    options[get_adapter(kind).resolution_field] = (size, size)
    if kind.startswith("pi0"):
        options["dtype"] = dtype
    if kind == "pi0_fast":
        # Sampling does not look at values, so it can be counted without any; it also never stops early.
        options["temperature"] = 1.0
    return PreTrainedConfig.get_choice_class(kind)(**options)


def construct(config: PreTrainedConfig, make: Callable[[PreTrainedConfig], Any]) -> Any:
    """Construct a dense policy in the precision it has, its weights undefined: made in float32, π0 would need 16 GB.

    Args:
        config: Of the policy.
        make: What constructs it.
    """
    with _no_initialisation(), _default_dtype(config):
        policy = make(config)
    if hasattr(policy.model, "paligemma_with_expert"):
        # What LeRobot keeps in float32 besides the parts of PaliGemma, which it converts itself.
        for name, module in policy.model.named_children():
            if name != "paligemma_with_expert":
                module.float()
    return policy


def instantiate(config: PreTrainedConfig, device: str) -> Any:
    """Build the policy on a device ("meta" for none) with random weights, in evaluation mode."""
    config.device = device
    with _offline(config), torch.device(device):
        policy = construct(config, build).eval()
    if config.type == "pi0_fast":
        # Decoded tokens are looked up on the CPU; random ones mean nothing.
        policy.detokenize_actions = _no_actions
    if device != "meta":
        _fill(policy)
    return policy


def make_batch(policy: Any, language_tokens: int, device: str) -> dict[str, Tensor]:
    """One random observation, as the policy's pre-processor would give it."""
    config = policy.config
    batch: dict[str, Tensor] = {
        key: torch.rand(1, *feature.shape, device=device) for key, feature in config.image_features.items()
    }
    batch[OBS_STATE] = torch.randn(1, STATE_SIZE, device=device)
    batch[OBS_LANGUAGE_TOKENS] = torch.full((1, language_tokens), 7, device=device)
    batch[OBS_LANGUAGE_ATTENTION_MASK] = torch.ones(1, language_tokens, dtype=torch.bool, device=device)
    return batch


def _no_actions(tokens: Tensor, action_horizon: int, action_dim: int) -> Tensor:
    return torch.zeros(len(tokens), action_horizon, action_dim, device=tokens.device)


def write_smolvlm(folder: Path) -> None:
    """Make a folder with what SmolVLA asks of `HuggingFaceTB/SmolVLM2-500M-Video-Instruct`, sizes and a tokenizer."""
    shutil.copytree(VLM_FOLDER, folder)
    sizes, content = json.loads(SMOLVLM2_500M.read_text()), json.loads((folder / "config.json").read_text())
    content["scale_factor"] = sizes["scale_factor"]
    for part in ("text_config", "vision_config"):
        content[part] |= sizes[part]
    (folder / "config.json").write_text(json.dumps(content))


@contextmanager
def _offline(config: Any) -> Iterator[None]:
    """While a policy is constructed, answer from here what LeRobot would ask the Hub."""
    if config.type == "smolvla":
        name = config.vlm_model_name
        with tempfile.TemporaryDirectory() as folder:
            vlm = Path(folder) / "vlm"
            write_smolvlm(vlm)
            config.vlm_model_name = str(vlm)
            try:
                yield
            finally:
                config.vlm_model_name = name
    elif config.type == "pi0_fast":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(VLM_FOLDER)
        module = "lerobot.policies.pi0_fast.modeling_pi0_fast"
        with patch(f"{module}.AutoProcessor") as processor, patch(f"{module}.AutoTokenizer") as text:
            processor.from_pretrained.return_value = None
            text.from_pretrained.return_value = tokenizer
            yield
    else:
        yield


@contextmanager
def _no_initialisation() -> Iterator[None]:
    """Skip the random initialisation of billions of weights that are filled afterwards, more cheaply."""
    names = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "kaiming_normal_")
    patches = [patch(f"torch.nn.init.{name}", lambda tensor, *args, **kwargs: tensor) for name in names]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


@contextmanager
def _default_dtype(config: Any) -> Iterator[None]:
    """What is made in this block is made in bfloat16, if the policy is."""
    saved = torch.get_default_dtype()
    if getattr(config, "dtype", "float32") == "bfloat16":
        torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(saved)


def _fill(policy: nn.Module, block: int = 1 << 20) -> None:
    """Give every parameter small random values by repeating one random block: cheap, and no denormals."""
    values = torch.randn(block) * 0.02
    with torch.no_grad():
        for parameter in policy.parameters():
            flat = parameter.view(-1)
            source = values.to(flat.device, flat.dtype)
            for start in range(0, len(flat), block):
                part = flat[start : start + block]
                part.copy_(source[: len(part)])
