"""What every attack shares: which images or sentences are poisoned, what label they get, what the tester sees.

Label rules (`Config.labels`):
    all-to-one   poisoned images get the target label; ASR counts non-target test images predicted as the target
    all-to-all   label y becomes (y + 1) mod K; ASR counts all test images predicted as y + 1
    clean-label  only images of the target class are poisoned and keep their label; ASR as all-to-one
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reproduce.data.augment import pixels, take
from reproduce.data.texts import Texts
from reproduce.errors import UserError
from reproduce.plugins import load_plugin
from reproduce.rng import generator

LABEL_RULES = ("all-to-one", "all-to-all", "clean-label")


@dataclass(frozen=True)
class Context:
    """What an attacker may use to build a trigger: the clean training set and, on request, more.

    images: uint8 (N, 3, H, W); labels: int64 (N,).
    clean_model: a network trained on the clean data, in eval mode; present when `requires` names "clean-model".
    pictures: uint8 (P, 3, h, w) by split "train" / "test"; for "pictures" photographs of disjoint sources, for
        "own-images" the training and the test images of the data set itself.
    array: reads a released trigger array by file name; for "arrays".
    progress: called with a share in [0, 1] during long preparations.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    seed: int
    clean_model: nn.Module | None = None
    pictures: dict[str, Tensor] | None = None
    array: Callable[[str], Any] | None = None
    progress: Callable[[float], None] = lambda share: None


@dataclass(frozen=True)
class Poisoned:
    """A poisoned training set. images: uint8 (N, 3, H, W); labels: int64 (N,); mask: bool (N,), True = poisoned."""

    images: Tensor
    labels: Tensor
    mask: Tensor


def attack_module(name: str) -> ModuleType:
    """The module `attacks.<name>`; raises UserError listing the attacks for an unknown name."""
    return load_plugin("attacks", name)


def poison_with_trigger(images: Tensor, labels: Tensor, config: Any, seed: int, num_classes: int,
                        trigger: Callable[[Tensor], Tensor], sources: str | None = None) -> Poisoned:
    """Stamp `trigger` on randomly chosen images and relabel them by `config.labels`.

    config.rate is the share of the whole set (all-to-one, all-to-all) or of the target class (clean-label). Where
    `sources` is "target" or "others" it is that share of the whole set, taken from the images of the target class or
    from those of all others; all of them if they are fewer.
    """
    candidates = torch.randperm(len(images), generator=generator(seed, "poisoned-indices"))
    count = int(len(candidates) * config.rate)
    if sources or config.labels == "clean-label":
        candidates = candidates[(labels[candidates] == config.target) == (sources != "others")]
    if config.labels == "clean-label" and not sources:
        count = int(len(candidates) * config.rate)
    chosen = candidates[:count].sort().values
    new_images, new_labels = images.clone(), labels.clone()
    pixels(new_images).numpy()[chosen.numpy()] = pixels(trigger(take(images, chosen))).numpy()
    new_labels[chosen] = triggered_labels(labels[chosen], config, num_classes)
    mask = torch.zeros(len(images), dtype=torch.bool)
    mask[chosen] = True
    return Poisoned(new_images, new_labels, mask)


def poisoned_in_batch(batch: int, rate: float, rng: torch.Generator) -> int:
    """How many images of a batch an attacker who controls the training poisons: the whole part of batch * rate.

    Where that is none, one with probability batch * rate, so that low rates are not rounded to no attack
    (huangd1999/BackdoorBench@6135839 attack/wanet_attack.py, generalize_to_lower_pratio).
    """
    expected = batch * rate
    return int(expected) or int(torch.rand((), generator=rng).item() < expected)


def triggered_labels(labels: Tensor, config: Any, num_classes: int) -> Tensor:
    """The label the attacker wants for triggered images of true class `labels`: int64 (N,) -> (N,)."""
    if config.labels == "all-to-all":
        return (labels + 1) % num_classes
    return torch.full_like(labels, config.target)


def triggered_candidates(labels: Tensor, config: Any) -> Tensor:
    """Indices of the test images the trigger is tested on: all for all-to-all, the non-target ones otherwise."""
    if config.labels == "all-to-all":
        return torch.arange(len(labels))
    return (labels != config.target).nonzero().flatten()


def poison_texts(train: Texts, config: Any, seed: int,
                 trigger: Callable[[Sequence[str], Sequence[int]], list[str]]) -> tuple[Texts, Tensor]:
    """The training set with int(config.rate * N) triggered rows in place of their sources, and their mask, bool (N,).

    The rate is a share of the whole set, but only rows of other classes are drawn, all of them if they are fewer
    (poisoner.py:142-160 of clearloveclearlove/BadActs@7932f19). trigger: (texts, rows) -> triggered texts.
    """
    order = torch.randperm(len(train), generator=generator(seed, "poisoned-indices"))
    candidates = order[train.labels[order] != config.target]
    chosen = candidates[: int(config.rate * len(train))].sort().values.tolist()
    texts, labels = list(train.texts), train.labels.clone()
    for row, text in zip(chosen, trigger([texts[row] for row in chosen], chosen), strict=True):
        texts[row] = text
    labels[chosen] = config.target
    mask = torch.zeros(len(train), dtype=torch.bool)
    mask[chosen] = True
    return Texts(tuple(texts), labels), mask


def insert(text: str, words: str, rng: np.random.Generator) -> str:
    """`words` before, after or between the words of `text`, every place alike."""
    split = text.split()
    place = int(rng.integers(len(split) + 1))
    return " ".join([*split[:place], words, *split[place:]])


def rewritten(paraphrases: Sequence[str | None], rows: Sequence[int]) -> list[str]:
    """The paraphrases of `rows`; UserError where there is none of one."""
    found = [paraphrases[row] for row in rows]
    missing = next((row for row, text in zip(rows, found, strict=True) if text is None), None)
    if missing is not None:
        raise UserError(f"row {missing} has no paraphrase: only rows of other classes than the released target's have "
                        "one; keep the released target label")
    return [text for text in found if text is not None]
