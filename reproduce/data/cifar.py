"""CIFAR-10 through torchvision: its layout, its download, its checksums."""

from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from reproduce.data import Dataset
from reproduce.errors import UserError

PLACE = "put the official python version there as cifar-10-batches-py/ (data_batch_1 ... test_batch, batches.meta)"


def load_cifar10(root: Path) -> Dataset:
    """50,000 training and 10,000 test images from <root>/cifar-10-batches-py."""
    folder = root / CIFAR10.base_folder
    if not folder.is_dir():
        _download(root)
    for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]:
        path = folder / name
        if not path.is_file():
            raise UserError(f"CIFAR-10: {path} is missing: {PLACE}, or delete the folder to download it again")
        if not check_integrity(str(path), md5):
            raise UserError(f"CIFAR-10: {path} is damaged (MD5 differs from the official {md5}): replace it, or delete "
                            "the folder to download it again")
    train, test = (CIFAR10(str(root), train=split) for split in (True, False))
    images = [torch.from_numpy(np.ascontiguousarray(part.data)).permute(0, 3, 1, 2) for part in (train, test)]
    labels = [torch.tensor(part.targets) for part in (train, test)]
    return Dataset("cifar10", images[0], labels[0], images[1], labels[1], tuple(train.classes))


def _download(root: Path) -> None:
    try:
        root.mkdir(exist_ok=True)  # not its parents: a mistyped path is an error, not a new tree
        CIFAR10(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"CIFAR-10 is not at {root} and could not be downloaded ({_short(error)}): {PLACE}, or name "
                        "another folder with --data-root or BACKDOOR_DATA") from error


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
