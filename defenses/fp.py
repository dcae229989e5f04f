"""FP: Fine-Pruning (Liu, Dolan-Gavitt & Garg, RAID 2018, arXiv:1805.12185).

A backdoor hides in neurons that clean inputs leave idle. So (1) prune the channels of the last convolutional layer,
least active on clean data first, as long as clean accuracy holds; (2) fine-tune what is left.

    a_c = mean over clean images and pixels of ReLU(BN(F))_c              F: output of the last residual group
    k   = the most channels, in order of a_c, with  acc(0) - acc(k') <= tolerance for every k' <= k
    then minimise CE over the remaining weights

Accuracy is measured on a part of the defender's own clean images. BackdoorBench@f02e353 (defense/fp.py) ranks at the
same place, the input of the classifier, but stops on test accuracy, with a relative 10 %.

The rows of BackdoorBench v1 (huangd1999/BackdoorBench@6135839, the fork of FMP's authors: v1, defense/fp/fp.py) have
that tolerance, here on held-out clean images, and keep the last epoch instead of that with the best test accuracy
(v1:535). Before pruning v1 freezes the model (:162), and in the copy that it fine-tunes only the two layers that
pruning replaced take gradients, the last convolution and the classifier (:309-312): ("fmp", "released").
BackdoorBench@f02e353 thaws it first (:400), and ("fmp", "described") trains all layers.

Departures. In a pre-activation ResNet the last convolution adds to a residual stream, so its own filters cannot switch
a channel off: we prune the channel after the sum, by setting scale and shift of the final BatchNorm to 0, which makes
the classifier's input exactly 0. ResNet-18, PreAct-ResNet18 and VGG-19 have no BatchNorm there: their channels are cut
off by zeros in the classifier's weights. a_c is always the mean of what the classifier sees: BackdoorBench's
PreAct-ResNet18 has neither BN nor ReLU there, so that a_c may be negative. Neither this paper's stopping rule nor the
settings NAD compared with were readable: tolerance and validation share are ours, and the fine-tuning is that of the
FT row. BackdoorBench ranks channels on cropped and flipped images of the whole clean set, we on the images as they are
of the part that is not held out.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from defenses import ft
from reproduce.data.augment import to_input
from reproduce.defending import Clean, Defended, split_validation
from reproduce.models.taps import classifier, penultimate
from reproduce.training import Observer, Recipe, silent


@dataclass(frozen=True)
class Config:
    """relative: the tolerance is a percentage of the victim's accuracy. last: train the last two layers only."""

    tolerance: float = 4.0          # ours: percentage points of validation accuracy
    validation: float = 0.2         # ours: share of the clean images
    recipe: Recipe = ft.RELEASED
    relative: bool = field(default=False, metadata={"since": "fmp"})
    last: bool = field(default=False, metadata={"since": "fmp"})


BENCH = Config(tolerance=10.0, relative=True, recipe=ft.BENCH)      # v1:474, config/defense/fp/cifar10.yaml, v1:490

SETTINGS = {
    ("nad", "described"): Config(recipe=ft.DESCRIBED),
    ("nad", "released"): Config(),
    ("fmp", "described"): BENCH,
    ("fmp", "released"): replace(BENCH, last=True),
}


def requires(config: Config) -> frozenset[str]:
    """Nothing but the clean images."""
    return frozenset()


def defend(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent,
           clean_model: nn.Module | None = None) -> Defended:
    """Prune a copy of `model`, then fine-tune it on all clean images with the pruned channels kept at zero.

    info: the pruned channels, and validation accuracy (percent) before and after pruning.
    """
    ranking, validation = split_validation(clean, config.validation, seed)
    repaired = deepcopy(model).eval()
    order = activations(repaired, ranking.images).mean(0).argsort()
    curve = pruning_curve(activations(repaired, validation.images), validation.labels, order, classifier(repaired))
    count = pruned_count(curve, points(config.tolerance, config.relative, curve[0]))
    pruned = order[:count]
    prune(repaired, pruned)
    repaired = ft.fine_tune(repaired, clean, config.recipe, seed, phase="pruned", observe=observe,
                            project=partial(prune, channels=pruned),
                            only=last_layers(repaired) if config.last else None)
    return Defended(repaired, {"pruned": sorted(pruned.tolist()), "channels": len(order),
                               "validation_acc": curve[0], "validation_acc_pruned": curve[count]})


@torch.no_grad()
def activations(model: nn.Module, images: Tensor) -> Tensor:
    """Mean of every last channel over the pixels: uint8 (N, 3, H, W) -> the classifier's input, (N, C)."""
    return torch.cat([penultimate(model, to_input(part))[1] for part in images.split(256)])


@torch.no_grad()
def pruning_curve(active: Tensor, labels: Tensor, order: Tensor, last: nn.Linear) -> list[float]:
    """Accuracy (percent) with 0, 1, ... C - 1 channels pruned in `order`. active: (N, C); labels: (N,)."""
    kept, curve = active.clone(), []
    for channel in order:
        curve.append(100 * (last(kept).argmax(1) == labels).sum().item() / len(labels))
        kept[:, channel] = 0
    return curve


def pruned_count(curve: list[float], tolerance: float) -> int:
    """How many channels can go before accuracy first drops by more than `tolerance` points."""
    beyond = [k for k, accuracy in enumerate(curve) if curve[0] - accuracy > tolerance]
    return beyond[0] - 1 if beyond else len(curve) - 1


def points(tolerance: float, relative: bool, accuracy: float) -> float:
    """A tolerance in percentage points; a relative one is a percentage of `accuracy`, which is in percent itself."""
    return tolerance * accuracy / 100 if relative else tolerance


@torch.no_grad()
def prune(model: nn.Module, channels: Tensor) -> None:
    """Cut `channels` off from the classifier, in place, on any input.

    Where the last layer is a BatchNorm its scale and shift become 0, and so the channels; else the classifier's weights
    for them do.
    """
    last = model.get_submodule(model.penultimate)
    if isinstance(last, nn.BatchNorm2d):
        last.weight.index_fill_(0, channels, 0.0)
        last.bias.index_fill_(0, channels, 0.0)
    else:
        classifier(model).weight.index_fill_(1, channels, 0.0)


def last_layers(model: nn.Module) -> list[str]:
    """The names of the last convolution that is wider than a pixel, and of the classifier."""
    convolutions = [name for name, module in model.named_modules()
                    if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [convolutions[-1], linear[-1]]
