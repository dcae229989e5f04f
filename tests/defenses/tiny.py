"""A small BatchNorm net and a few images, made of formulas: what the official code was run on, to compare with it."""

import torch
from torch import Tensor, nn


def wave(shape: tuple[int, ...], step: float) -> Tensor:
    """A tensor every version of torch agrees on, between -1 and 1."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * step).float().view(shape)


def tiny_net(activation: type[nn.Module]) -> nn.Module:
    """(N, 3, 8, 8) -> (N, 5), with BatchNorms of 4 and 6 channels; in train mode."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), activation(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), activation(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            parameter.copy_(wave(parameter.shape, 0.7 + 0.1 * index))
        net[1].weight.add_(1.5)
        net[4].weight.add_(1.5)
    return net


def tiny_batches() -> tuple[Tensor, Tensor]:
    """Three batches of 8: uint8 (3, 8, 3, 8, 8) and labels (3, 8)."""
    images = (wave((3, 8, 3, 8, 8), 0.37) * 127.5 + 127.5).round().to(torch.uint8)
    return images, torch.arange(24).view(3, 8) % 5
