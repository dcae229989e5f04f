"""ResNet-18 for 32x32 images (He, Zhang, Ren & Sun, CVPR 2016), as MCLDef uses it beside WideResNet.

The CIFAR form of the network: 3x3 stem conv of stride 1 to 64 channels, BN-ReLU, no max pooling; four groups of two
basic blocks of widths 64/128/256/512 and strides 1/2/2/2; each block conv3x3-BN-ReLU-conv3x3-BN, plus the shortcut
(1x1 conv and BN where the shape changes), ReLU; then global average pooling, linear classifier. No conv bias.
Initialisation as in MCLDef's code (Zhihao151/MCL@1ce3f44 models/resnet.py): conv N(0, sqrt(2 / (k k C_out))), BatchNorm
1 / 0, classifier PyTorch's own.

Parameter names are those of the public pytorch-cifar line (`conv1`, `layer1.0.bn1`, `layer2.0.shortcut.0`, ...,
`linear`). MCLDef's code and torchvision call the shortcut `downsample` and the classifier `fc`; `load_checkpoint`
reads both. Differences: the average pooling is global, which equals the 4x4 window on 32x32 images.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """(N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x), inplace=True)


def group(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """Two basic blocks; the output has passed a ReLU."""
    return nn.Sequential(BasicBlock(c_in, c_out, stride), BasicBlock(c_out, c_out, 1))


class ResNet18(nn.Module):
    """(N, 3, 32, 32) in [0, 1] -> (N, num_classes). With 10 classes it has 11,173,962 parameters."""

    taps = ("layer1", "layer2", "layer3", "layer4")
    penultimate = "layer4"
    aliases = (("downsample.", "shortcut."), ("fc.", "linear."))

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = group(64, 64, 1)
        self.layer2 = group(64, 128, 2)
        self.layer3 = group(128, 256, 2)
        self.layer4 = group(256, 512, 2)
        self.linear = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))
