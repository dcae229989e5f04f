"""Trojan: a patch that is itself computed, so that it excites one neuron of a clean network.

Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018. Two steps on a clean network:

    1. the neuron    n = argmax_n sum_k |W_kn|, W the classifier's weights: the best connected of its inputs a_n
    2. the trigger   minimise (a_n(x with the patch) - target_value)^2 over the pixels of the patch

"described" does this (neuron inversion) and pastes the patch over the image. "released" is NAD's code
(data_loader.py@f17b713:410-417): a stored 3x3 array is added to the image and the sum cast to uint8 before the clip,
so bright pixels wrap around modulo 256 and the clip does nothing. How that array was made is not in its repository.

Departures of "described": the paper inverts on one input without the training data and then retrains the network; we
average over a few clean training images, because the patch must work when pasted on such images, and train the victim
from scratch like every other attack. NAD's size and place are not stated where we could read; those of its released
array are used. Signed gradient steps, their size and the target value follow BackdoorBench; the number of steps and
of images is ours, as is keeping the best patch seen.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from attacks.badnets import stamp
from reproduce.errors import UserError
from reproduce.models.taps import classifier, penultimate
from reproduce.poisoning import Context, Poisoned, poison_with_trigger
from reproduce.rng import generator


@dataclass(frozen=True)
class Config:
    """array: name of the released trigger file, or None to invert a neuron with the settings below it."""

    array: str | None
    target: int = 5  # NAD config.py@f17b713:43
    rate: float = 0.1  # NAD config.py@f17b713:42
    labels: str = "all-to-one"  # NAD config.py@f17b713:45
    side: int = 3  # the nonzero square of NAD's released array, rows and columns 25-27 of 32
    row: int = -7
    column: int = -7
    target_value: float = 100.0  # BackdoorBench config/attack/trojannn/preactresnet18.yaml@f02e353
    step: float = 0.1  # BackdoorBench attack/trojannn.py@f02e353:76, pixels in [0, 1]
    steps: int = field(default=200, metadata={"smoke": 50})  # ours (BackdoorBench 1000): it has levelled off
    images: int = 32  # ours


SETTINGS = {
    ("nad", "described"): Config(array=None),
    ("nad", "released"): Config(array="best_square_trigger_cifar10.npz"),  # NAD data_loader.py@f17b713:412
    # ARGD data_loader.py@6354666:474-481, the same array; config.py:46-47, README.md:8
    ("argd", "released"): Config(array="best_square_trigger_cifar10.npz", target=0, rate=0.2),
}


def requires(config: Config) -> frozenset[str]:
    return frozenset({"arrays"} if config.array else {"clean-model"})


def prepare(config: Config, context: Context) -> dict[str, Tensor]:
    """{"patch": uint8}: (3, H, W) to be added modulo 256 for the released array, (3, side, side) to be pasted else."""
    if config.array:
        array = np.asarray(context.array(config.array))
        if array.shape != tuple(context.images.shape[1:]):
            raise UserError(f"{config.array} is a trigger for images of shape {array.shape}, "
                            f"not {tuple(context.images.shape[1:])}")
        # Truncating the array first is the same: its values are not negative and pixels are whole numbers.
        return {"patch": torch.from_numpy(array.astype(np.int64).astype(np.uint8))}
    return {"patch": invert_neuron(config, context)}


def best_connected(model: nn.Module) -> int:
    """The input of the classifier with the largest sum of absolute outgoing weights."""
    return int(classifier(model).weight.detach().abs().sum(0).argmax())


def activation(model: nn.Module, images: Tensor, neuron: int) -> Tensor:
    """a_n for images in [0, 1], float (N, 3, H, W) -> (N,): one of the pooled features the classifier receives."""
    return penultimate(model, images)[1][:, neuron]


def invert_neuron(config: Config, context: Context) -> Tensor:
    """Descend the pixels of the patch until the neuron reaches the target value; uint8 (3, side, side)."""
    model, neuron = context.clean_model, best_connected(context.clean_model)
    device = next(model.parameters()).device
    rng = generator(context.seed, "trojan-inversion")
    chosen = torch.randperm(len(context.images), generator=rng)[:config.images]
    images = context.images[chosen].to(device).float() / 255
    height, width = images.shape[2:]
    top, left = config.row % height, config.column % width
    region = (slice(None), slice(None), slice(top, top + config.side), slice(left, left + config.side))
    patch = torch.rand(3, config.side, config.side, generator=rng).to(device)
    best_cost, best = float("inf"), patch
    for step in range(config.steps):
        patch.requires_grad_()
        stamped = images.clone()
        stamped[region] = patch
        cost = (activation(model, stamped, neuron) - config.target_value).square().mean()
        gradient, = torch.autograd.grad(cost, patch)
        patch = patch.detach()
        if cost.item() < best_cost:
            best_cost, best = cost.item(), patch
        # Steps shrink to a fiftieth, so that the end refines instead of jumping by a tenth of the range.
        size = config.step * (1 - 0.98 * step / config.steps)
        patch = (patch - size * gradient.sign()).clamp(0, 1)
        context.progress((step + 1) / config.steps)
    return (best * 255).round().to(torch.uint8).cpu()


def apply(images: Tensor, config: Config, state: dict[str, Tensor], seed: int, split: str) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W)."""
    if config.array:
        patch = state["patch"].to(images.device)
        rows, columns = (patch.any(0).any(axis).nonzero().flatten() for axis in (1, 0))
        box = (..., slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))  # zero outside: skip that
        result = images.clone()
        result[box] += patch[box]  # uint8 addition wraps around, as the released cast does
        return result
    return stamp(images, [(state["patch"], config.row, config.column)])


def poison(images: Tensor, labels: Tensor, config: Config, state: dict[str, Tensor], seed: int,
           num_classes: int) -> Poisoned:
    """images: uint8 (N, 3, H, W); labels: int64 (N,)."""
    return poison_with_trigger(images, labels, config, seed, num_classes,
                               lambda chosen: apply(chosen, config, state, seed, "train"))
