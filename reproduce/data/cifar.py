"""CIFAR-10 and CIFAR-100 through torchvision: its layout, its download, its checksums."""

from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from reproduce.data import Dataset
from reproduce.errors import UserError

# name: (title, torchvision's data set, what its folder holds)
SOURCES: dict[str, tuple[str, type[CIFAR10], str]] = {
    "cifar10": ("CIFAR-10", CIFAR10, "data_batch_1 ... test_batch, batches.meta"),
    "cifar100": ("CIFAR-100", CIFAR100, "train, test, meta"),
}


def load_cifar(name: str, root: Path) -> Dataset:
    """50,000 training and 10,000 test images from torchvision's folder under `root`; of CIFAR-100 the fine labels."""
    title, source, files = SOURCES[name]
    place = f"put the official python version there as {source.base_folder}/ ({files})"
    folder = root / source.base_folder
    if not folder.is_dir():
        _download(title, source, root, place)
    for file, md5 in [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]:
        path = folder / file
        if not path.is_file():
            raise UserError(f"{title}: {path} is missing: {place}, or delete the folder to download it again")
        if not check_integrity(str(path), md5):
            raise UserError(f"{title}: {path} is damaged (MD5 differs from the official {md5}): replace it, or delete "
                            "the folder to download it again")
    train, test = (source(str(root), train=split) for split in (True, False))
    images = [torch.from_numpy(np.ascontiguousarray(part.data)).permute(0, 3, 1, 2) for part in (train, test)]
    labels = [torch.tensor(part.targets) for part in (train, test)]
    return Dataset(name, images[0], labels[0], images[1], labels[1], tuple(train.classes))


def _download(title: str, source: type[CIFAR10], root: Path, place: str) -> None:
    try:
        root.mkdir(exist_ok=True)  # not its parents: a mistyped path is an error, not a new tree
        source(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{title} is not at {root} and could not be downloaded ({short(error)}): {place}, or name "
                        "another folder with --data-root or BACKDOOR_DATA") from error


def short(error: Exception) -> str:
    """One line of an error."""
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
