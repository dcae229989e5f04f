"""BadNets: a small pattern of fixed pixels marks the poisoned images.

Gu, Dolan-Gavitt & Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain",
arXiv:1708.06733. NAD (Li et al., ICLR 2021) uses it with the 3x3 pattern below in the bottom-right corner.

    x'[:, row:row+h, column:column+w] = pattern          the same in the three colour channels
    y' = target

Departures: none known. The per-attack table of NAD's appendix was not readable to us; target, rate and pattern are
those of the released code, so "described" and "released" are one setting. ARGD's code (BililiCode/ARGD@6354666) moves
the trigger to the middle of the image. Its config.py labels by "cleanLabel", which is ARGD's setting of attacks/cl.py;
its README calls the model it comes with all-to-one, which is used here.

("fmp", "described") is BackdoorBench's BadNets, on which FMP's code builds (huangd1999/BackdoorBench@6135839): the
white square in the very corner. As in all settings of FMP there, poisoned images come from all classes, the target's
too. Departure, in all of them: the number of poisoned images is rounded down, theirs to the nearest. The attacks of FMP
and their settings are those of that code; the paper's own list was not readable to us.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from reproduce.poisoning import Context, Poisoned, poison_with_trigger

# NAD data_loader.py@f17b713:307-319, rows from the top. Its top-left cell is 0: not a perfect checkerboard.
GRID = ((0, 0, 255), (0, 255, 0), (255, 0, 255))
# NAD data_loader.py@f17b713:300-305, used there one pixel away from the border (row = column = -4).
SQUARE = ((255, 255, 255), (255, 255, 255), (255, 255, 255))
# ARGD data_loader.py@6354666:387-399, pasted at (CENTRE, CENTRE). Its bottom-right cell is 128: not a perfect
# checkerboard either.
CENTRE_GRID = ((255, 128, 255), (128, 255, 128), (255, 128, 128))
CENTRE = 18


@dataclass(frozen=True)
class Config:
    """pattern: grey levels by row; row, column: where its top-left pixel goes, negative counts from the far edge."""

    target: int = 5  # NAD config.py@f17b713:43
    rate: float = 0.1  # NAD config.py@f17b713:42
    labels: str = "all-to-one"  # NAD config.py@f17b713:45
    pattern: tuple[tuple[int, ...], ...] = GRID  # NAD config.py@f17b713:44
    row: int = -3  # NAD data_loader.py@f17b713:307-319
    column: int = -3


RELEASED = Config()
SETTINGS = {
    ("nad", "described"): RELEASED,
    ("nad", "released"): RELEASED,
    ("argd", "released"): Config(
        target=0,  # ARGD config.py@6354666:47, README.md:8
        rate=0.2,  # ARGD config.py@6354666:46
        labels="all-to-one",  # ARGD README.md@6354666:8
        pattern=CENTRE_GRID, row=CENTRE, column=CENTRE),
    # BackdoorBench@6135839 config/attack/badnet/cifar10.yaml, as are target and rate; resource/badnet/
    ("fmp", "described"): Config(target=0, rate=0.1, pattern=SQUARE, row=-3, column=-3),
}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def prepare(config: Config, context: Context) -> dict[str, Tensor]:
    """Nothing to prepare: the trigger is in the config."""
    return {}


def stamp(images: Tensor, patches: Iterable[tuple[Tensor, int, int]]) -> Tensor:
    """A copy of `images`, uint8 (N, 3, H, W), with patches (pattern, row, column) pasted over them.

    pattern: uint8 (h, w) or (3, h, w); row and column of its top-left pixel, negative ones count from the far edge.
    """
    stamped = images.clone()
    for pattern, row, column in patches:
        row, column = row % images.shape[2], column % images.shape[3]
        stamped[:, :, row:row + pattern.shape[-2], column:column + pattern.shape[-1]] = pattern.to(images.device)
    return stamped


def apply(images: Tensor, config: Config, state: dict[str, Tensor], seed: int, split: str) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W) with the pattern pasted in."""
    return stamp(images, [(torch.tensor(config.pattern, dtype=torch.uint8), config.row, config.column)])


def poison(images: Tensor, labels: Tensor, config: Config, state: dict[str, Tensor], seed: int,
           num_classes: int) -> Poisoned:
    """images: uint8 (N, 3, H, W); labels: int64 (N,)."""
    return poison_with_trigger(images, labels, config, seed, num_classes,
                               lambda chosen: apply(chosen, config, state, seed, "train"))
