"""PreAct-ResNet18 for small images (He, Zhang, Ren & Sun, ECCV 2016), as BackdoorBench and so FMP use it.

3x3 stem conv of stride 1 to w channels; four groups of two basic blocks of widths w/2w/4w/8w and strides 1/2/2/2; each
block BN-ReLU-conv3x3-BN-ReLU-conv3x3 plus the shortcut, which is a 1x1 conv of the already BN-ReLU'd input where the
shape changes; then global average pooling and a linear classifier. No conv bias. w = 64 in the papers; the narrow ones
are ours, for computers without a GPU. Initialisation is PyTorch's own.

As in models/preact_resnet.py of SCLBD/BackdoorBench@f02e353 (the same in huangd1999/BackdoorBench@6135839 and in the
pytorch-cifar line it comes from), and unlike in the paper, no BN-ReLU follows the last group: the classifier sees the
averaged residual sums, which may be negative.

Parameter names, and the order in which layers are registered and run, are BackdoorBench's, so its checkpoints load
strictly. Departure: the normalisation that its data loader does is part of the network (`Normalised`).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.models.normalised import Normalised


class PreActBlock(nn.Module):
    """(N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.bn2(self.conv1(out)), inplace=True)
        return shortcut + self.conv2(out)


def group(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """Two blocks; the output is the raw residual sum."""
    return nn.Sequential(PreActBlock(c_in, c_out, stride), PreActBlock(c_out, c_out, 1))


class PreActResNet18(Normalised):
    """(N, 3, H, W) in [0, 1] -> (N, num_classes). With width 64 and 10 classes it has 11,171,146 parameters."""

    taps = ("layer1", "layer2", "layer3", "layer4")
    penultimate = "layer4"
    # There, not here, a block adds its shortcut in place to its last convolution's output (:41): see `defenses/fmp.py`.
    adds_in_place = True

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.layer1 = group(width, width, 1)
        self.layer2 = group(width, 2 * width, 2)
        self.layer3 = group(2 * width, 4 * width, 2)
        self.layer4 = group(4 * width, 8 * width, 2)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.normalise(x))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))
