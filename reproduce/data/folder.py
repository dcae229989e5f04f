"""A user's own clean images in torchvision's ImageFolder layout: one sub-folder per class, named by its label, or so
that alphabetical order is the label order of the checkpoint."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reproduce.defending import Clean
from reproduce.errors import UserError
from reproduce.rng import generator


def load_folder(folder: Path, num_classes: int, size: int = 32) -> Clean:
    """All images below `folder`, RGB, resized to size x size, the classes mixed: what takes its batches in the order
    of the clean subset (I-BAU) would otherwise see one class in each. Raises UserError for a wrong layout or a bad
    image."""
    from torchvision.datasets import ImageFolder  # three seconds to import

    class Numbered(ImageFolder):
        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            classes, _index = super().find_classes(directory)
            if all(name.isascii() and name.isdecimal() for name in classes):    # 2 comes before 10
                classes.sort(key=int)
            return classes, {name: label for label, name in enumerate(classes)}

    try:
        listing = Numbered(str(folder))
    except (FileNotFoundError, OSError) as error:
        raise UserError(f"--images {folder}: {str(error).splitlines()[0]}; expected one sub-folder of images per "
                        "class") from error
    if len(listing.classes) != num_classes:
        raise UserError(f"--images {folder}: {len(listing.classes)} class folders, but the model has {num_classes} "
                        "classes; name one sub-folder per class, in label order")
    arrays = []
    for path, _label in listing.samples:
        try:
            with Image.open(path) as image:
                small = _eight_bits(image, path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
                arrays.append(np.asarray(small))
        # A damaged picture may raise any of these.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"--images: {path} is not a readable image; remove or replace it") from error
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    mixed = torch.randperm(len(images), generator=generator(0, "folder"))
    return Clean(images[mixed], torch.tensor(listing.targets)[mixed], num_classes)


def _eight_bits(image: Image.Image, path: str) -> Image.Image:
    """The image, if it has sixteen bits a value scaled to eight, which Pillow would cut off instead."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"--images: {path} has values of 32 bits, whose white is not known: save it with 8 or 16")
    return image
