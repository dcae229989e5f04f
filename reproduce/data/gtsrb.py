"""GTSRB, 43 traffic signs: torchvision's layout and download, resized once to 32x32 and kept as gtsrb-32.npz."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import GTSRB
from torchvision.transforms.functional import InterpolationMode, resize

from reproduce.data import Dataset
from reproduce.errors import UserError

CACHE = "gtsrb-32.npz"
SHAPES = {"train": 39_209, "test": 12_630}
PLACE = (f"put {CACHE} there (train_images (39209, 32, 32, 3) uint8, train_labels, test_images (12630, ...), "
         "test_labels), or torchvision's layout gtsrb/GTSRB/...")


def load_gtsrb(root: Path) -> Dataset:
    """39,209 labelled images of torchvision's or the cache's training split and 12,630 test images."""
    path = root / CACHE
    if not path.exists():
        _build(root, path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for split in SHAPES for name in (f"{split}_images", f"{split}_labels")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"GTSRB: {path} is damaged ({error}): replace it, or delete it and {PLACE}") from error
    for split in SHAPES:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) != len(labels):
            raise UserError(f"GTSRB: {path} holds {split} images of shape {images.shape} and type {images.dtype} with "
                            f"{len(labels)} labels: expected (n, 32, 32, 3) uint8 and n labels; replace it")
    tensors = {split: (torch.from_numpy(arrays[f"{split}_images"]).permute(0, 3, 1, 2),
                       torch.from_numpy(arrays[f"{split}_labels"]).long()) for split in SHAPES}
    return Dataset("gtsrb", *tensors["train"], *tensors["test"], tuple(str(i) for i in range(43)))


def _build(root: Path, path: Path) -> None:
    """Make the cache from torchvision's data set, bilinear with antialiasing."""
    arrays = {}
    for split in SHAPES:
        try:
            source = GTSRB(str(root), split=split, download=not (root / "gtsrb").is_dir())
        except (OSError, RuntimeError) as error:
            raise UserError(f"GTSRB is not at {root} and could not be downloaded: {PLACE}, or name another folder with "
                            "--data-root or BACKDOOR_DATA") from error
        pairs = [source[i] for i in range(len(source))]
        arrays[f"{split}_images"] = np.stack(
            [np.asarray(resize(image, [32, 32], InterpolationMode.BILINEAR)) for image, _label in pairs])
        arrays[f"{split}_labels"] = np.array([label for _image, label in pairs])
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.replace(path)
