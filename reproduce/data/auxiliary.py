"""What attacks need besides the data set: reflection photographs and trigger arrays released by authors.

Under the data root, neither of which comes with this project:

    aux/refool_selected/   photographs, *.jpg or *.png. Files of one folder are split into train and test by the part
                           of their name before the last dash (crops of one photograph stay together: every fifth
                           photograph, in alphabetical order, is for testing); sub-folders train/ and test/ are
                           taken as they are.
    aux/triggers/          arrays by file name, *.npy or *.npz, and pictures, *.jpg or *.png
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reproduce.errors import UserError

SIDE = 224  # the size of the pictures selected by Refool's authors
SUFFIXES = {".jpg", ".jpeg", ".png"}


def pictures(data_root: Path | None, allow_samples: bool) -> dict[str, Tensor]:
    """Reflection photographs, uint8 (P, 3, 224, 224), for "train" and "test"; no photograph is in both.

    allow_samples: crops of scikit-learn's two sample photographs instead, whatever the data root holds, so that the
    embedded profile gives the same numbers on every machine.
    """
    if allow_samples:
        from sklearn.datasets import load_sample_image  # a second to import, and rarely needed
        return {split: crops(torch.from_numpy(load_sample_image(f"{name}.jpg").copy()).permute(2, 0, 1))
                for split, name in (("train", "china"), ("test", "flower"))}
    folder = _inside(data_root, "aux/refool_selected", "reflection pictures are missing: put .jpg or .png photographs")
    return {split: torch.stack([square(Image.open(path).convert("RGB")) for path in paths])
            for split, paths in _split(folder).items()}


def released_array(data_root: Path | None, name: str) -> Any:
    """The array `name` below aux/triggers: that of an .npy, "x" of an .npz, or a picture's pixels, uint8 (h, w, 3)."""
    path = _inside(data_root, f"aux/triggers/{name}", f"released trigger array {name} is missing: put it")
    if path.suffix.lower() in SUFFIXES:
        return np.array(Image.open(path).convert("RGB"))
    loaded = np.load(path)
    return loaded["x"] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded


def _inside(data_root: Path | None, place: str, problem: str) -> Path:
    """data_root/place; where it does not exist, UserError naming the problem and the place."""
    if data_root is None:
        raise UserError(f"{problem} at {place} under a data root, and name that with --data-root or BACKDOOR_DATA")
    if not (path := data_root / place).exists():
        raise UserError(f"{problem} at {path}")
    return path


def _split(folder: Path) -> dict[str, list[Path]]:
    """The photographs of `folder` by split, in alphabetical order."""
    if (folder / "train").is_dir() or (folder / "test").is_dir():
        chosen = {split: _photographs(folder / split) for split in ("train", "test")}
    else:
        paths = _photographs(folder)
        sources = sorted({_source(path) for path in paths})
        testing = set(sources[::5])
        chosen = {"train": [path for path in paths if _source(path) not in testing],
                  "test": [path for path in paths if _source(path) in testing]}
    for split, paths in chosen.items():
        if not paths:
            raise UserError(f"no {split} photographs in {folder}: at least two different ones are needed, "
                            "or one each in its sub-folders train and test")
    return chosen


def _photographs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)


def _source(path: Path) -> str:
    """The photograph a crop was cut from: "2008_000041-07.jpg" -> "2008_000041"."""
    return path.stem.rsplit("-", 1)[0]


def square(picture: Image.Image) -> Tensor:
    """The central square, resized to uint8 (3, SIDE, SIDE)."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    cut = picture.crop((left, top, left + side, top + side))
    if side != SIDE:
        cut = cut.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1)


def crops(photograph: Tensor) -> Tensor:
    """3 x 5 overlapping squares of a photograph: uint8 (3, h, w) -> (15, 3, SIDE, SIDE)."""
    rows = torch.linspace(0, photograph.shape[1] - SIDE, 3).int().tolist()
    columns = torch.linspace(0, photograph.shape[2] - SIDE, 5).int().tolist()
    return torch.stack([photograph[:, r:r + SIDE, c:c + SIDE] for r in rows for c in columns])
