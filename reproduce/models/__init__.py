"""Victim architectures by name, and their initialisation from a seed.

An architecture is a module (N, 3, H, W) in [0, 1] -> (N, num_classes) whose class names its parts:

    taps         the layers whose attention is looked at, from input to output
    penultimate  the layer whose ReLU, averaged over the pixels, is the classifier's input
    classifier   the linear layer at the end
    aliases      optional: (theirs, ours) parts of parameter names, for checkpoints that spell them otherwise
"""

import inspect
from pathlib import Path

import torch
from torch import Tensor, nn

from reproduce.errors import UserError
from reproduce.models.resnet import ResNet18
from reproduce.models.wide_resnet import WideResNet
from reproduce.rng import derive

# name: (class, its arguments before num_classes)
ARCHITECTURES: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    f"wrn-{depth}-{width}": (WideResNet, (depth, width))
    for depth, width in ((10, 1), (16, 1), (10, 2), (16, 2), (40, 1), (40, 2))
} | {"resnet-18": (ResNet18, ())}

# (mean, standard deviation) per channel that public training scripts subtract and divide by.
NORMALISATIONS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


def build(name: str, num_classes: int, seed: int) -> nn.Module:
    """A freshly initialised model, channels-last, in train mode; fixed by (name, num_classes, seed)."""
    if name not in ARCHITECTURES:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initialisation", name, num_classes))
        architecture, arguments = ARCHITECTURES[name]
        model = architecture(*arguments, num_classes)
    return model.to(memory_format=torch.channels_last)


def source(name: str) -> Path:
    """The file that defines the architecture `name`."""
    return Path(inspect.getfile(ARCHITECTURES[name][0]))


def parameter_count(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters())


def normalise_inputs(model: nn.Module, name: str) -> nn.Module:
    """Make `model` take images in [0, 1] although it was trained on normalised ones. Its weights keep their names."""
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in NORMALISATIONS[name])

    def normalise(_module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return ((inputs[0] - mean.to(inputs[0].device)) / deviation.to(inputs[0].device),)

    model.register_forward_pre_hook(normalise)
    return model
