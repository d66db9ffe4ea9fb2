"""LoRA (Hu et al. 2021, with peft) in a base policy, and checkpoints with its products added to the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lerobot_policy_grids.errors import GridsError

# Name under which peft stores the matrices.
NAME = "default"


def add_lora(base: Any, rank: int) -> None:
    """Freeze a base policy and add trainable low-rank matrices to LeRobot's default target modules.

    Args:
        base: The dense policy; its modules are replaced in place.
        rank: Rank of the matrices; their product is scaled by 2.

    Raises:
        GridsError: If peft is missing, or LeRobot names no targets for this policy.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise GridsError(
            f"LoRA needs peft ({error}); pip install 'lerobot_policy_grids[lora]', or give --model.train all or reducer"
        ) from error
    targets = base._get_default_peft_targets()
    if not targets:
        raise GridsError(f"LeRobot names no LoRA targets for '{base.config.type}'; give --model.train all or reducer")
    base.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets["target_modules"])
    inject_adapter_in_model(config, base, adapter_name=NAME)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(".lora_" in name)


@contextmanager
def without_lora(base: nn.Module) -> Iterator[None]:
    """Disable LoRA for the duration of the block, so the policy is as before `add_lora`."""
    layers: list[Any] = [module for module in base.modules() if hasattr(module, "get_delta_weight")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def state_with_lora_added(policy: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state of a policy with LoRA's products added to the weights, under the names without LoRA.

    The policy itself is not changed, because adding in place and subtracting again would round its frozen weights.

    Args:
        policy: The policy with LoRA layers.
        state: Its full state, if the policy is sharded over processes; None takes `policy.state_dict()`.
    """
    state = policy.state_dict() if state is None else state
    layers = {name: module for name, module in policy.named_modules() if hasattr(module, "get_delta_weight")}
    if not layers:
        return state
    added: dict[str, Tensor] = {}
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if owner and leaf == "weight":
            layer: Any = layers[owner]
            down, up = (state[f"{owner}.lora_{side}.{NAME}.weight"] for side in "AB")
            tensor = tensor + (layer.scaling[NAME] * (up @ down)).to(tensor.dtype)
        added[f"{owner}.{leaf}" if owner else name] = tensor
    return added
