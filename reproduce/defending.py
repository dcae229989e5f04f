"""What every defense shares: the clean data it is given, and the repaired model or the guard it gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from reproduce.data.texts import Texts
from reproduce.errors import UserError
from reproduce.models.encoder import LayerHook, TextClassifier
from reproduce.plugins import load_plugin
from reproduce.rng import generator
from reproduce.training import Observer


@dataclass(frozen=True)
class Clean:
    """The defender's clean data, its classes mixed. images: uint8 (N, 3, H, W); labels: int64 (N,).

    test: the clean TEST images, uint8, granted only where `requires` names "test-images". No defense may ask for them
    but to reproduce a published script that leaks them into its result (FMP's); they come without labels.

    measured: test accuracy and ASR (percent) of a model, granted only where `requires` names "test-asr": for a row that
    says in its name that it chose by them (ANP's oracle).
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    test: Tensor | None = None
    measured: Callable[[nn.Module], tuple[float, float]] | None = None


@dataclass
class Defended:
    """A repaired model in eval mode; `info`: what the method itself reports (MCR's t, pruned channels, ...);
    `tensors`: what a figure may want to show of it (an inverted trigger), stored with the run."""

    model: nn.Module
    info: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


REJECTED = -1   # the label of an input that a detector refuses to classify


@dataclass(frozen=True)
class Judged:
    """What a guard makes of N sentences.

    labels: int64 (N,), REJECTED where one is refused. suspicion: float32 (N,), high = poisoned, and flagged: bool (N,);
    both None for a defense that detects nothing.
    """

    labels: Tensor
    suspicion: Tensor | None = None
    flagged: Tensor | None = None


@dataclass
class Guard:
    """A defended text classifier: `judge` classifies sentences; the victim is untouched unless `model` is given.

    held_out: suspicion of the clean sentences that the threshold was chosen on, where there is one.
    kept: of a defense that cleans the training set, the rows of it that it keeps, bool (N,).
    hook: what the guard does to the activations of the victim, for the figures. info, tensors: as in `Defended`.
    """

    judge: Callable[[Sequence[str]], Judged]
    model: TextClassifier | None = None
    threshold: float | None = None
    held_out: Tensor | None = None
    hook: LayerHook | None = None
    kept: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingData:
    """For defenses that clean the training set: the poisoned set, and how a victim of the same recipe, seed and
    initialisation is trained on another one: (sentences, observer) -> classifier in eval mode."""

    train: Texts
    fit: Callable[[Texts, Observer], TextClassifier]


def judged(labels: Tensor, suspicion: Tensor, threshold: float, otherwise: Tensor | None = None) -> Judged:
    """`labels` (N,), and where suspicion is above the threshold `otherwise`'s, or REJECTED without it."""
    flagged = suspicion > threshold
    instead = torch.full_like(labels, REJECTED) if otherwise is None else otherwise
    return Judged(torch.where(flagged, instead, labels), suspicion, flagged)


def false_rejection_threshold(held_out: Tensor, frr: float) -> float:
    """The threshold above which about the share `frr` of clean sentences lies, as the released detectors take it: the
    suspicion at place int(N * frr) of N, counted from the highest."""
    ordered = held_out.sort(descending=True).values
    return float(ordered[min(int(len(ordered) * frr), len(ordered) - 1)])


def halves(clean: Texts, seed: int, purpose: str, share: float = 0.5) -> tuple[Texts, Texts]:
    """The defender's sentences in two parts: int(share * N) drawn at random, and the rest."""
    order = torch.randperm(len(clean), generator=generator(seed, purpose))
    cut = int(len(clean) * share)
    return clean.take(order[:cut]), clean.take(order[cut:])


def clean_texts(validation: Texts, fraction: float, seed: int) -> Texts:
    """The share `fraction` of the validation split, drawn uniformly; nested at one seed, as `clean_subset`."""
    order = torch.randperm(len(validation), generator=generator(seed, "clean-subset"))
    return validation.take(order[: int(fraction * len(validation))].sort().values)


def defense_module(name: str) -> ModuleType:
    """The module `defenses.<name>`; raises UserError listing the defenses for an unknown name."""
    return load_plugin("defenses", name)


def clean_subset(images: Tensor, labels: Tensor, fraction: float, seed: int, num_classes: int) -> Clean:
    """The share `fraction` of the clean training set, drawn uniformly, the same for every defense at this seed.

    Subsets at one seed are nested: the 1 % subset is contained in the 5 % one.
    """
    order = torch.randperm(len(images), generator=generator(seed, "clean-subset"))
    chosen = order[: int(fraction * len(images))].sort().values
    return Clean(images[chosen], labels[chosen], num_classes)


def split_validation(clean: Clean, share: float, seed: int) -> tuple[Clean, Clean]:
    """(training part, validation part) of the defender's own data, for choices that may not use test data.

    Raises UserError for fewer than two images.
    """
    if len(clean.images) < 2:
        raise UserError("this defense holds clean images out to choose by: one is too few, give it more")
    order = torch.randperm(len(clean.images), generator=generator(seed, "validation"))
    cut = max(1, round(share * len(order)))
    parts = order[cut:].sort().values, order[:cut].sort().values
    training, validation = (Clean(clean.images[i], clean.labels[i], clean.num_classes) for i in parts)
    return training, validation
