"""lerobot-grids with a small ResNet in the place of ACT's, so that ACT learns MetaWorld on a CPU.

python benchmarks/small_act.py fit --policy act --base.pretrained_backbone_weights null --dataset demonstrations ...
python benchmarks/small_act.py eval --policy outputs/act-16 --videos 0 --episodes 50

`python benchmarks/study.py act-base`, then `act`, run it. The policy is LeRobot's own class, and the commands and
options are those of lerobot-grids. LeRobot takes its backbone from torchvision by name. The smallest one, ResNet18, has
11 M parameters, and gives 6 x 6 tokens only of images of 192 x 192; a CPU core trains it on 8 to 18 of these a second.

In this program `resnet18` is a ResNet of 0.3 M parameters: torchvision's blocks, one per stage instead of two, with 16
to 96 channels instead of 64 to 512. As in the stem of `tiny`, two channels of coordinates come in, and norms are over
groups of channels: frozen batch normalisation does nothing for random weights. A token is 16 x 16 pixels: 6 x 6 tokens
of an image of 96 x 96. A checkpoint of this program loads in this program alone.
"""

import sys
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from lerobot_grids_cli.main import main

WIDTHS = (16, 32, 64, 96)
norm = partial(nn.GroupNorm, 8)


class Stem(nn.Module):
    """A convolution with stride 2 over RGB and two coordinate channels, its norm and ReLU.

    Args:
        width: Channels of the result.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, width, 5, stride=2, padding=2, bias=False)
        self.norm = norm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Turn images [b, 3, h, w] into a feature map [b, width, h / 2, w / 2]."""
        batch, _, height, width = images.shape
        rows, columns = (torch.linspace(-1, 1, n, device=images.device, dtype=images.dtype) for n in (height, width))
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(batch, -1, -1, -1)
        pixels = torch.cat([images, places], dim=1).contiguous(memory_format=torch.channels_last)
        return nn.functional.relu(self.norm(self.conv(pixels)))


def block(inputs: int, outputs: int) -> BasicBlock:
    """torchvision's residual block with stride 2."""
    shortcut = nn.Sequential(conv1x1(inputs, outputs, 2), norm(outputs))
    return BasicBlock(inputs, outputs, 2, shortcut, norm_layer=norm)


def resnet18(**options: Any) -> nn.Module:
    """What LeRobot's ACT asks of torchvision's function of this name: `layer4` is the map, `fc` knows its channels."""
    assert options["weights"] is None, "there are no weights of this ResNet; --base.pretrained_backbone_weights null"
    stem, first, second, last = WIDTHS
    return nn.Sequential(
        OrderedDict(
            conv1=Stem(stem),
            layer1=block(stem, first),
            layer2=block(first, second),
            layer4=block(second, last),
            fc=nn.Linear(last, 1),
        )
    )


if __name__ in ("__main__", "__mp_main__"):
    # The second is the name of this file in the processes of `compare --workers`.
    torchvision.models.resnet18 = resnet18

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
