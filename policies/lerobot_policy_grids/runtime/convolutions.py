"""Convolutions with the batch norms behind them in their weights."""

import copy
from itertools import pairwise
from typing import Any

from torch import nn
from torch.nn.utils import fuse_conv_bn_weights


def without_norms(backbone: nn.Module) -> nn.Module:
    """A copy of a convolutional network in which frozen batch norms are part of the convolutions in front of them.

    A norm belongs to the convolution that its module lists directly before it, as in torchvision's networks. The same
    up to rounding.

    Args:
        backbone: Stays as it is.
    """
    from torchvision.ops import FrozenBatchNorm2d

    backbone = copy.deepcopy(backbone)
    for module in list(backbone.modules()):
        children = list(module.named_children())
        for (_, convolution), (name, norm) in pairwise(children):
            if type(convolution) is nn.Conv2d and type(norm) is FrozenBatchNorm2d:
                statistics: Any = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
                fused = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
                convolution.weight, convolution.bias = fused
                setattr(module, name, nn.Identity())
    return backbone.requires_grad_(False)
