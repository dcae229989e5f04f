"""Tiny-ImageNet, 200 classes of 64x64 photographs (Le & Yang, 2015), kept as tiny-imagenet-64.npz once it was read.

The test split is the validation folder, as everywhere: the labels of the real test images were never published. A
label is the place of the class's WordNet number in alphabetical order, as with torchvision's ImageFolder, which
BackdoorBench uses.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.utils import download_and_extract_archive

from reproduce.data import Dataset
from reproduce.data.archive import Archive
from reproduce.data.cifar import short
from reproduce.errors import UserError

FOLDER = "tiny-imagenet-200"
# As in dataset/Tiny.py of SCLBD/BackdoorBench@f02e353.
URL, MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
PLACE = f"unpack tiny-imagenet-200.zip there as {FOLDER}/ (train/, val/)"
ARCHIVE = Archive("tiny-imagenet", "Tiny-ImageNet", "tiny-imagenet-64.npz", 64, PLACE, tuple(map(str, range(200))),
                  counts={"train": 100_000, "test": 10_000})

Listed = list[tuple[int, Path]]     # (label, file)


def load_tiny_imagenet(root: Path) -> Dataset:
    """100,000 training and 10,000 validation images. The folder may be as it was released, or with its val/ sorted into
    class folders, as BackdoorBench leaves it."""
    if not (root / ARCHIVE.file).exists():
        folder = root / FOLDER
        if not folder.is_dir():
            _download(root)
        listed = _listed(folder)
        ARCHIVE.write(root, {split: (_pixels(files), np.array([label for label, _file in files]))
                             for split, files in listed.items()})
    return ARCHIVE.read(root)


def _listed(folder: Path) -> dict[str, Listed]:
    """Every image of both splits, by label and then by name."""
    names = sorted(path.name for path in (folder / "train").glob("n*") if path.is_dir())
    if len(names) != len(ARCHIVE.classes):
        raise UserError(f"Tiny-ImageNet: {folder / 'train'} has {len(names)} class folders n..., expected "
                        f"{len(ARCHIVE.classes)}: {PLACE}, or delete {folder} to download it again")
    labels = {name: label for label, name in enumerate(names)}
    found = {"train": [(label, path) for name, label in labels.items()
                       for path in (folder / "train" / name / "images").glob("*.JPEG")],
             "test": _validation(folder / "val", labels)}
    for split, files in found.items():
        if len(files) != ARCHIVE.counts[split]:
            raise UserError(f"Tiny-ImageNet: {folder} has {len(files)} {split} images, expected "
                            f"{ARCHIVE.counts[split]}: {PLACE}, or delete the folder to download it again")
    return {split: sorted(files) for split, files in found.items()}


def _validation(folder: Path, labels: dict[str, int]) -> Listed:
    annotations = folder / "val_annotations.txt"
    if not annotations.is_file():
        return [(label, path) for name, label in labels.items() for path in (folder / name).glob("*.JPEG")]
    found = []
    for number, line in enumerate(annotations.read_text(errors="replace").splitlines(), 1):
        file, name, *_box = [*line.split(), "", ""]
        if name not in labels:
            raise UserError(f"Tiny-ImageNet: line {number} of {annotations} does not name an image and one of the "
                            f"{len(labels)} classes: {PLACE}")
        found.append((labels[name], folder / "images" / file))
    return found


def _pixels(files: Listed) -> np.ndarray:
    """uint8 (n, 64, 64, 3); grey pictures become RGB."""
    side = ARCHIVE.side
    pixels = np.empty((len(files), side, side, 3), np.uint8)
    for row, (_label, path) in zip(pixels, files, strict=True):
        try:
            with Image.open(path) as picture:
                if picture.size != (side, side):
                    raise UserError(f"Tiny-ImageNet: {path} is {picture.size[0]} x {picture.size[1]} pixels, expected "
                                    f"{side} x {side}; replace it")
                row[:] = np.asarray(picture.convert("RGB"))
        except OSError as error:
            raise UserError(f"Tiny-ImageNet: {path} is missing or no readable image; replace it") from error
    return pixels


def _download(root: Path) -> None:
    try:
        root.mkdir(exist_ok=True)  # not its parents: a mistyped path is an error, not a new tree
        download_and_extract_archive(URL, str(root), md5=MD5, remove_finished=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"Tiny-ImageNet is not at {root} and could not be downloaded ({short(error)}): {PLACE}, or "
                        "name another folder with --data-root or BACKDOOR_DATA") from error
