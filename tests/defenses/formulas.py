"""Tensors and a model by formula, so that other people's code could be run on the same ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wave(shape: tuple[int, ...], step: float, phase: float = 0.0) -> Tensor:
    """A tensor every version of torch agrees on."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * step + phase).float().view(shape)


class Tiny(nn.Module):
    """(N, 3, 12, 12) -> (N, 4): a convolution, tanh, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 5, 2), nn.Linear(24, 4)
        for k, parameter in enumerate(self.parameters()):
            parameter.data.copy_(wave(parameter.shape, 0.7, k) * (0.3 if k < 2 else 1.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(torch.tanh(self.conv(images)), 2).flatten(1))


def batches() -> list[Tensor]:
    """Three batches of 8 images."""
    return list((wave((24, 3, 12, 12), 0.37) * 0.5 + 0.5).split(8))
