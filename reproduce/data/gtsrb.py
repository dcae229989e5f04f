"""GTSRB, 43 traffic signs: torchvision's layout and download, resized once to 32x32 and kept as gtsrb-32.npz."""

from pathlib import Path

import numpy as np
from torchvision.datasets import GTSRB
from torchvision.transforms.functional import InterpolationMode, resize

from reproduce.data import Dataset
from reproduce.data.archive import SPLITS, Archive
from reproduce.errors import UserError

# No counts: torchvision's training split has 26,640 of the 39,209 labelled images.
ARCHIVE = Archive(
    "gtsrb", "GTSRB", "gtsrb-32.npz", 32,
    "put gtsrb-32.npz there (train_images (39209, 32, 32, 3) uint8, train_labels, test_images (12630, ...), "
    "test_labels), or torchvision's layout gtsrb/GTSRB/...",
    tuple(map(str, range(43))))


def load_gtsrb(root: Path) -> Dataset:
    """39,209 labelled images of torchvision's or the cache's training split and 12,630 test images."""
    if not (root / ARCHIVE.file).exists():
        ARCHIVE.write(root, {split: _read(root, split) for split in SPLITS})
    return ARCHIVE.read(root)


def _read(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of torchvision's data set, bilinear with antialiasing."""
    try:
        source = GTSRB(str(root), split=split, download=not (root / "gtsrb").is_dir())
    except (OSError, RuntimeError) as error:
        raise UserError(f"GTSRB is not at {root} and could not be downloaded: {ARCHIVE.place}, or name another folder "
                        "with --data-root or BACKDOOR_DATA") from error
    pairs = [source[i] for i in range(len(source))]
    images = np.stack([np.asarray(resize(image, [32, 32], InterpolationMode.BILINEAR)) for image, _label in pairs])
    return images, np.array([label for _image, label in pairs])
