"""What every defense shares: the clean subset it is given and the repaired model it gives back."""

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from reproduce.plugins import load_plugin
from reproduce.rng import generator


@dataclass(frozen=True)
class Clean:
    """The defender's clean data. images: uint8 (N, 3, H, W); labels: int64 (N,)."""

    images: Tensor
    labels: Tensor
    num_classes: int


@dataclass
class Defended:
    """A repaired model in eval mode; `info`: what the method itself reports (MCR's t, pruned channels, ...);
    `tensors`: what a figure may want to show of it (an inverted trigger), stored with the run."""

    model: nn.Module
    info: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def defense_module(name: str) -> ModuleType:
    """The module `defenses.<name>`; raises UserError listing the defenses for an unknown name."""
    return load_plugin("defenses", name, Path(__file__).parent.parent / "defenses")


def clean_subset(images: Tensor, labels: Tensor, fraction: float, seed: int, num_classes: int) -> Clean:
    """The share `fraction` of the clean training set, drawn uniformly, the same for every defense at this seed.

    Subsets at one seed are nested: the 1 % subset is contained in the 5 % one.
    """
    order = torch.randperm(len(images), generator=generator(seed, "clean-subset"))
    chosen = order[: int(fraction * len(images))].sort().values
    return Clean(images[chosen], labels[chosen], num_classes)


def split_validation(clean: Clean, share: float, seed: int) -> tuple[Clean, Clean]:
    """(training part, validation part) of the defender's own data, for choices that may not use test data."""
    order = torch.randperm(len(clean.images), generator=generator(seed, "validation"))
    cut = max(1, round(share * len(order)))
    parts = order[cut:].sort().values, order[:cut].sort().values
    training, validation = (Clean(clean.images[i], clean.labels[i], clean.num_classes) for i in parts)
    return training, validation
