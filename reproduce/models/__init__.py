"""Victim architectures by name, and their initialisation from a seed.

An architecture is a module (N, 3, H, W) in [0, 1] -> (N, num_classes) whose class names its parts:

    taps         the layers whose attention is looked at, from input to output
    penultimate  the layer that gives the classifier its inputs, a channel each: through a ReLU or none, averaged over
                 the pixels if it has any (what comes of it: `taps.penultimate`)
    aliases      optional: (theirs, ours) parts of parameter names, for checkpoints that spell them otherwise

The classifier is the last linear layer (`taps.classifier`). Where those who train an architecture normalise its images
first, as BackdoorBench does, it does that itself (`normalised.Normalised`), as its data set has it.
"""

import inspect
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from reproduce.errors import UserError
from reproduce.models.normalised import IDENTITY, NORMALISATIONS, Normalisation, Normalised
from reproduce.models.preact_resnet import PreActResNet18
from reproduce.models.resnet import ResNet18
from reproduce.models.vgg import VGG19BN
from reproduce.models.wide_resnet import WideResNet
from reproduce.rng import derive

# name: (class, its arguments before num_classes)
ARCHITECTURES: dict[str, tuple[type[nn.Module], tuple[float, ...]]] = {
    f"wrn-{depth}-{width}": (WideResNet, (depth, width))
    for depth, width in ((10, 0.5), (10, 1), (16, 1), (10, 2), (16, 2), (40, 1), (40, 2))
} | {
    "resnet-18": (ResNet18, ()),
    "preact-resnet-18": (PreActResNet18, (64,)),
    "preact-resnet-18-w16": (PreActResNet18, (16,)),
    "preact-resnet-18-w8": (PreActResNet18, (8,)),
    "vgg-19-bn": (VGG19BN, ()),
}

# oneDNN (in torch 2.15, on AVX-512) writes outside its memory in the gradient of a 1x1 convolution of stride 2 with 8
# input channels at 56x56 pixels and above, which this architecture has on these images.
CRASHES = ("preact-resnet-18-w8", "tiny-imagenet")

# What a checkpoint's images may have been normalised with, for users to name: "cifar10" as most public training scripts
# do it. BackdoorBench's values differ and belong to its architectures.
CHECKPOINT_NORMALISATIONS: dict[str, Normalisation] = {
    "none": IDENTITY,
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


def build(name: str, num_classes: int, seed: int, dataset: str | None = None) -> nn.Module:
    """A freshly initialised model, channels-last, in train mode; its weights are fixed by (name, num_classes, seed).

    dataset: whose images an architecture that normalises will see; others do not ask.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(ARCHITECTURES)}")
    if (name, dataset) == CRASHES:
        raise UserError(f"{name} is for images of 32x32, {dataset} has larger ones: choose preact-resnet-18-w16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initialisation", name, num_classes))
        architecture, arguments = ARCHITECTURES[name]
        model = architecture(*arguments, num_classes)
    if isinstance(model, Normalised):
        model.set_normalisation(NORMALISATIONS.get(dataset, IDENTITY))
    return model.to(memory_format=torch.channels_last)


def source(name: str) -> Path:
    """The file that defines the architecture `name`."""
    return Path(inspect.getfile(ARCHITECTURES[name][0]))


@cache
def size(name: str, side: int = 32) -> float:
    """Work of a forward pass of one image of `side` pixels, as a multiple of WRN-16-1's at 32; to estimate time."""
    return _operations(name, side) / _operations("wrn-16-1", 32)


@cache
def _operations(name: str, side: int) -> int:
    """Multiplications of convolutions and linear layers. torch's own counter takes seconds to import."""
    model, count = build(name, 10, 0).eval(), 0

    def counted(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal count
        count += layer.weight[0].numel() * output.numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(counted)
    with torch.inference_mode():
        model(torch.zeros(1, 3, side, side))
    return count


def parameter_count(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in model.parameters())


def normalise_inputs(model: nn.Module, name: str) -> nn.Module:
    """Make `model` take images in [0, 1] although it was trained on images normalised by the values `name`. Its weights
    keep their names, and as in a network that normalises itself, `normalise` is what its first layer sees."""
    normalisation = CHECKPOINT_NORMALISATIONS[name]
    if isinstance(model, Normalised):
        model.set_normalisation(normalisation)
        return model
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in normalisation)

    def normalise(images: Tensor) -> Tensor:
        return (images - mean.to(images.device)) / deviation.to(images.device)

    model.normalise = normalise
    model.register_forward_pre_hook(lambda _module, inputs: (normalise(inputs[0]),))
    return model


def check_outputs(logits: Tensor) -> None:
    """Raises UserError for outputs of a model that are not numbers, of which the largest would be the first."""
    if logits.isnan().any():
        raise UserError("the model's outputs are not numbers: its weights are damaged, or what trained or repaired it "
                        "diverged")
