"""Data sets that are made once from many small files and kept as one .npz: train_images, train_labels, test_images,
test_labels."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from reproduce.data import Dataset
from reproduce.errors import UserError
from reproduce.rng import generator

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Archive:
    """What the file of a data set must hold: images uint8 (n, side, side, 3) and integer labels (n,) below the number
    of classes. place: how to get it right. counts: n of each split, where only one n is right."""

    name: str
    title: str
    file: str
    side: int
    place: str
    classes: tuple[str, ...]
    counts: dict[str, int] | None = None

    def read(self, root: Path) -> Dataset:
        """The data set in root/file, its training images in a mixed order, the same for everybody. Raises UserError for
        anything but what it should be."""
        path = root / self.file
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {split: (archive[f"{split}_images"], archive[f"{split}_labels"]) for split in SPLITS}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.title}: {path} is damaged ({error}): replace it, or delete it and "
                            f"{self.place}") from error
        for split, (images, labels) in arrays.items():
            if images.dtype != np.uint8 or images.shape[1:] != (self.side, self.side, 3) \
                    or labels.shape != images.shape[:1]:
                raise UserError(f"{self.title}: {path} holds {split} images of shape {images.shape} and type "
                                f"{images.dtype} with labels of shape {labels.shape}: expected "
                                f"(n, {self.side}, {self.side}, 3) uint8 and n labels; replace it")
            if self.counts and len(labels) != self.counts[split]:
                raise UserError(f"{self.title}: {path} holds {len(labels)} {split} images, expected "
                                f"{self.counts[split]}; replace it")
            if labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0 \
                    or labels.max() >= len(self.classes):
                raise UserError(f"{self.title}: the {split} labels of {path} are no whole numbers from 0 to "
                                f"{len(self.classes) - 1}; replace it")
        # Stored class by class: a defense that takes its clean images as they come would see batches of one class.
        images, labels = arrays["train"]
        mixed = torch.randperm(len(labels), generator=generator(0, "training-order", self.name)).numpy()
        arrays["train"] = images[mixed], labels[mixed]
        tensors = [(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long())
                   for images, labels in (arrays[split] for split in SPLITS)]
        return Dataset(self.name, *tensors[0], *tensors[1], self.classes)

    def write(self, root: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Keep (images, labels) of both splits; a process that dies meanwhile leaves no file of that name."""
        path = root / self.file
        partial = path.with_suffix(".partial.npz")
        try:
            np.savez(partial, **{f"{split}_{kind}": array for split, pair in splits.items()
                                 for kind, array in zip(("images", "labels"), pair, strict=True)})
            partial.replace(path)
        except OSError as error:
            raise UserError(f"{self.title}: {path} cannot be written ({error.strerror}): make {root} writable and "
                            "leave room there, or name another folder with --data-root or BACKDOOR_DATA") from error
