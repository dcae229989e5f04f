"""WideResNet-depth-width for 32x32 images (Zagoruyko & Komodakis, BMVC 2016), as NAD, ARGD and MCLDef use it.

Pre-activation: 3x3 stem conv to 16 channels; three groups of n = (depth - 4) / 6 basic blocks of widths 16k/32k/64k
and strides 1/2/2; each block BN-ReLU-conv3x3-BN-ReLU-conv3x3; where the width changes, the 1x1 shortcut takes the
already BN-ReLU'd input; then BN-ReLU, global average pooling, linear classifier. No conv bias, no dropout.
Initialisation: conv N(0, sqrt(2 / (k k C_out))), BatchNorm 1 / 0, classifier bias 0.

Parameter names are those of the public WideResNet-pytorch line (`conv1`, `block1.layer.0.bn1`, ..., `fc`), so the
papers' checkpoints load strictly. Layers run in the order they are registered, and the sum is not in place, as there
(models/wresnet.py:28-37 of bboylyg/NAD@f17b713): FMP's released script depends on both. Differences from it: group 1 of
width 1 has no shortcut conv there either; the average pooling is global, which equals its 8x8 window on 32x32 images.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """(N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, padding=1, bias=False)
        self.convShortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return (x if self.convShortcut is None else self.convShortcut(activated)) + out


class Group(nn.Module):
    """n basic blocks; its output is the raw residual sum, before any BatchNorm: where attention is tapped."""

    def __init__(self, n: int, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(BasicBlock(c_in if i == 0 else c_out, c_out, stride if i == 0 else 1) for i in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """(N, 3, 32, 32) in [0, 1] -> (N, num_classes). WRN-16-1 with 10 classes has 175,066 parameters.

    width: factor on 16, 32 and 64 channels. 0.5 is no network of the papers: it is for smoke scale, where it trains
    nearly three times as fast as 1.
    """

    taps = ("block1", "block2", "block3")
    penultimate = "bn1"

    def __init__(self, depth: int, width: float, num_classes: int) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"WideResNet depth must be 6n + 4, not {depth}")
        n, widths = (depth - 4) // 6, [int(channels * width) for channels in (16, 32, 64)]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Group(n, 16, widths[0], 1)
        self.block2 = Group(n, widths[0], widths[1], 2)
        self.block3 = Group(n, widths[1], widths[2], 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(out)).mean((2, 3)))
