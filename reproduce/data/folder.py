"""A user's own clean images in torchvision's ImageFolder layout: one sub-folder per class, named so that
alphabetical order is the label order of the checkpoint."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reproduce.defending import Clean
from reproduce.errors import UserError


def load_folder(folder: Path, num_classes: int, size: int = 32) -> Clean:
    """All images below `folder`, RGB, resized to size x size. Raises UserError for a wrong layout or a bad image."""
    from torchvision.datasets import ImageFolder  # three seconds to import
    try:
        listing = ImageFolder(str(folder))
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
                arrays.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)))
        except (OSError, Image.DecompressionBombError) as error:
            raise UserError(f"--images: {path} is not a readable image; remove or replace it") from error
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return Clean(images, torch.tensor(listing.targets), num_classes)
