"""Random crop, flip and Cutout as batched uint8 tensor code: the counterpart of the papers' PIL transforms.

The parameters of a batch are drawn first (on the CPU, so every device sees the same ones) and applied afterwards;
given the same parameters the result equals torchvision's RandomCrop / RandomHorizontalFlip and the papers' Cutout
pixel for pixel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """What is randomised. Everything off is the identity.

    crop: zero padding in pixels on each side before a random crop back to the original size.
    flip: horizontal flip with probability 1/2.
    cutout: side in pixels of one blanked square, centre uniform in the image, clipped at the border. The papers'
    code blanks rows y - length // 2 to y + length // 2 - 1, so its "length 3" is `cutout=2`.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0

    @property
    def active(self) -> bool:
        return bool(self.crop or self.flip or self.cutout)


def pixels(images: Tensor) -> Tensor:
    """The same memory as (N, H, W, 3): rows of whole pixels, where channels-last images can be copied fast."""
    return images.permute(0, 2, 3, 1)


def take(images: Tensor, index: Tensor) -> Tensor:
    """images[index], a hundred times faster than that for channels-last images; uint8 (N, 3, H, W) -> (M, 3, H, W)."""
    return pixels(images).index_select(0, index).permute(0, 3, 1, 2)


def draw(count: int, size: int, augment: Augment, rng: torch.Generator) -> Tensor:
    """Parameters for `count` images: int64 (count, 5) = crop row, crop column, flip, cutout row, cutout column."""
    limits = (2 * augment.crop + 1, 2 * augment.crop + 1, 2 if augment.flip else 1, size, size)
    return torch.stack([torch.randint(limit, (count,), generator=rng) for limit in limits], dim=1)


def apply(images: Tensor, parameters: Tensor, augment: Augment) -> Tensor:
    """Augment one batch. images: uint8 (N, C, H, W); parameters: (N, 5) from `draw`; returns uint8 (N, C, H, W)."""
    n, _channels, height, width = images.shape
    top, left, flip, cut_row, cut_column = parameters.unbind(1)
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    source_rows = rows + top[:, None] - augment.crop
    ordered = torch.where(flip[:, None].bool(), width - 1 - columns, columns)
    source_columns = ordered + left[:, None] - augment.crop
    keep_rows = (source_rows >= 0) & (source_rows < height)
    keep_columns = (source_columns >= 0) & (source_columns < width)
    keep = keep_rows[:, :, None] & keep_columns[:, None, :]
    if augment.cutout:
        half = augment.cutout // 2
        cut_rows = (rows >= cut_row[:, None] - half) & (rows < cut_row[:, None] + augment.cutout - half)
        cut_columns = (columns >= cut_column[:, None] - half) & (columns < cut_column[:, None] + augment.cutout - half)
        keep &= ~(cut_rows[:, :, None] & cut_columns[:, None, :])
    source = source_rows.clamp(0, height - 1)[:, :, None] * width + source_columns.clamp(0, width - 1)[:, None, :]
    # Whole RGB pixels, by index_select: each is three times faster than channels and than indexing with brackets.
    rows_of_pixels = pixels(images).reshape(n * height * width, -1)
    offset = torch.arange(n, device=images.device)[:, None, None] * (height * width)
    moved = rows_of_pixels.index_select(0, (source + offset).flatten()).view(n, height, width, -1) * keep[..., None]
    return moved.permute(0, 3, 1, 2)


def to_input(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float32 in [0, 1], channels-last. The papers do no mean/std normalisation here."""
    return images.to(memory_format=torch.channels_last).float().div_(255)
