"""The ResNet for 32 x 32 images of He et al. 2015 (arXiv 1512.03385), section 4.2: depth 6 n + 2 with 16, 32 and 64 channels.

A 3 x 3 convolution, three stages of n blocks of two 3 x 3 convolutions, the second and third stage beginning with stride 2, global
average pooling, one Linear. Shortcuts are option A, without parameters: where a block halves the image and doubles the channels, the
shortcut takes every other row and column and adds channels of zeros, half of them before and half after.

Any image size works that two halvings leave something of; the graph has no control flow that depends on data, so that torch.fx and
torch.export trace it for any batch size. Module names are those of the usual published state dicts (conv1, layer1.0.conv1, ..., linear).

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class Shortcut(nn.Module):
    """Option A: every other row and column, and zeros for the channels that are added."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.padding = (0, 0, 0, 0, added // 2, added - added // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C + added, ceil(H / 2), ceil(W / 2)]."""
        return F.pad(x[:, :, ::2, ::2], self.padding)


class Block(nn.Module):
    """Two convolutions and the shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, ceil(H / stride), ceil(W / stride)]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """float32 `pixel_values` [N, channels, H, W] -> logits [N, num_labels]."""

    def __init__(self, depth: int, channels: int, num_labels: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = stage(WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = stage(WIDTHS[0], WIDTHS[1], blocks, stride=2)
        self.layer3 = stage(WIDTHS[1], WIDTHS[2], blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(WIDTHS[2], num_labels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits [N, num_labels]."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


def stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks of one width, of which the first has ``stride``."""
    return nn.Sequential(*[Block(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks)])
