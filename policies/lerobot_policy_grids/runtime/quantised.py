"""Trunk and action expert with weights of 8 bits, by torchao."""

from importlib.util import find_spec

from torch import nn

from .layers import DecoderLayer
from .phases import Phases, UnavailableError

# int8 has each weight as 8 bits with a scale for each output, and computes as before; int8_dynamic also rounds what the
# weights are multiplied with, token by token, and multiplies whole numbers.
QUANTISATIONS = ("none", "int8", "int8_dynamic")


class Quantised(nn.Linear):
    """A linear layer whose weights torchao keeps."""


def quantise(phases: Phases, name: str) -> None:
    """Give the decoder layers of both phases weights of 8 bits. The policy's own, and the vision tower's, stay.

    Args:
        phases: Just built.
        name: One of `QUANTISATIONS`.

    Raises:
        UnavailableError: If torchao is not installed, or there are no such layers.
    """
    if name == "none":
        return
    if find_spec("torchao") is None:
        raise UnavailableError(f"quantise={name} needs torchao: pip install 'lerobot_policy_grids[quantise]'")
    layers = [*phases.prefill.modules(), *phases.denoise_step.modules()]
    decoders = [layer for layer in layers if isinstance(layer, DecoderLayer)]
    if not decoders:
        raise UnavailableError(f"quantise={name} changes layers of a language model, and this policy acts without one")
    for layer in decoders:
        layer.change_weights(lambda linear: _quantised(linear, name))


def _quantised(linear: nn.Linear, name: str) -> nn.Linear:
    """The same layer with weights of 8 bits."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    # torchao changes a layer in place, and this one may be the policy's.
    copy = Quantised(linear.in_features, linear.out_features, bias=False, device="meta")
    copy.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
    quantize_(copy, Int8WeightOnlyConfig() if name == "int8" else Int8DynamicActivationInt8WeightConfig())
    copy.register_parameter("bias", linear.bias)
    return copy
