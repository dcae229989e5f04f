"""Data sets in memory, by name: images as uint8 tensors, texts as strings (`reproduce.data.texts`).

cifar10, cifar100, gtsrb and tiny-imagenet come from a data root (`--data-root`, or the variable BACKDOOR_DATA, or
./data) in their usual layouts, and are downloaded there where a network exists; digits is embedded in scikit-learn,
sentences is generated.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from reproduce.data import sentences
from reproduce.data.texts import SOURCES, TextDataset, load_texts, sizes
from reproduce.errors import UserError

IMAGE, TEXT = "image", "text"


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, 3, S, S), channels-last in memory, S = 32 except for tiny-imagenet's 64; labels int64 (N,) in
    [0, num_classes)."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


IMAGE_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "gtsrb": 43, "tiny-imagenet": 200}
NUM_CLASSES = IMAGE_CLASSES | {"sentences": len(sentences.CLASSES)} | {
    name: len(source.classes) for name, source in SOURCES.items()}


def modality(name: str) -> str:
    """IMAGE or TEXT. Raises UserError for an unknown data set."""
    if name not in NUM_CLASSES:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(NUM_CLASSES)}")
    return IMAGE if name in IMAGE_CLASSES else TEXT


def attacker_target(name: str) -> int:
    """The label that attacks on a text data set aim at, as released."""
    return SOURCES[name].target if name in SOURCES else sentences.TARGET


def sentences_in(name: str) -> tuple[int, int, int]:
    """How many sentences train, validation and test of a text data set hold."""
    return sizes(name) if name in SOURCES else tuple(sentences.COUNTS.values())


def data_root(argument: str | Path | None = None) -> Path:
    """Where data sets are: the argument, else BACKDOOR_DATA, else ./data."""
    return Path(argument or os.environ.get("BACKDOOR_DATA") or "data").expanduser()


@lru_cache(maxsize=2)
def load(name: str, root: Path) -> Dataset:
    """The image data set `name`. Raises UserError naming any missing or damaged file and what to do."""
    if modality(name) != IMAGE:
        raise UserError(f"{name} holds texts, not images: choose one of {', '.join(IMAGE_CLASSES)}")
    if name == "digits":
        from reproduce.data.digits import load_digits
        return load_digits()
    if name in ("cifar10", "cifar100"):
        from reproduce.data.cifar import load_cifar
        return load_cifar(name, root)
    if name == "tiny-imagenet":
        from reproduce.data.tiny_imagenet import load_tiny_imagenet
        return load_tiny_imagenet(root)
    from reproduce.data.gtsrb import load_gtsrb
    return load_gtsrb(root)


@lru_cache(maxsize=2)
def load_text(name: str, root: Path) -> TextDataset:
    """The text data set `name`. Raises UserError naming any missing or damaged file and what to do."""
    if modality(name) != TEXT:
        known = [other for other in NUM_CLASSES if other not in IMAGE_CLASSES]
        raise UserError(f"{name} holds images, not texts: choose one of {', '.join(known)}")
    if name == "sentences":
        return sentences.load_sentences()
    return load_texts(name, root)
