"""Blend: the trigger is a whole picture, often noise, blended faintly over the image.

Chen, Liu, Li, Lu & Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning",
arXiv:1712.05526, blended injection with a pattern k:

    x' = (1 - ratio) * x + ratio * k,     y' = target

NAD's two readings differ in k:
    fixed-rgb    one random colour pattern, the same for every image, in training and in testing (Chen et al.)
    fresh-grey   grey noise drawn anew for every image, in training and in testing: what NAD's released code does
                 (data_loader.py@f17b713:392-399). Any 20 % grey noise is then a trigger; there is no fixed pattern.

Departures: NAD's ratio and pattern are not stated where we could read; the ratio of its released code is used for
both. The result is truncated to uint8 as in the released code. We compute the truncated blend in whole numbers, which
equals its float64 arithmetic for every pair of pixel values at ratio 0.2 (there is a test), at half the cost.

FMP's code builds on BackdoorBench (huangd1999/BackdoorBench@6135839), whose k is a cartoon cat, the art of others and
not part of this project:
    drawing      "described": a house under the sun, drawn here
    file         "released": that picture, or one of your own under its name, at aux/triggers/hello_kitty.jpeg below the
                 data root; resized as there. A run knows it by its name, not by its content
Departure: there the weighted pattern is in single precision, which makes one pair of pixel values in 26 one grey level
darker.

("mcldef", "released") is what MCLDef's code calls Blend (Zhihao151/MCL@1ce3f44 data_loader.py:515-532):
    grid         no picture over the image, but nine pixels of it: a grid blended in where ARGD's code pastes its own
"""

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attacks.badnets import CENTRE, CENTRE_GRID
from reproduce.poisoning import Context, Poisoned, poison_with_trigger
from reproduce.rng import derive, generator


@dataclass(frozen=True)
class Config:
    """ratio: weight of the picture, in steps of 1/100; noise: which one, see above; picture: file name for "file"."""

    noise: str
    target: int = 5  # NAD config.py@f17b713:43
    rate: float = 0.1  # NAD config.py@f17b713:42
    labels: str = "all-to-one"  # NAD config.py@f17b713:45
    ratio: float = 0.2  # NAD data_loader.py@f17b713:393
    picture: str | None = field(default=None, metadata={"since": "fmp"})


SETTINGS = {
    ("nad", "described"): Config(noise="fixed-rgb"),
    ("nad", "released"): Config(noise="fresh-grey"),
    # ARGD data_loader.py@6354666:458-463, the same noise; config.py:46-47, README.md:8
    ("argd", "released"): Config(noise="fresh-grey", target=0, rate=0.2),
    # BackdoorBench config/attack/blended/cifar10.yaml@6135839: target, rate, ratio and picture
    ("fmp", "described"): Config(noise="drawing", target=0),
    ("fmp", "released"): Config(noise="file", target=0, picture="hello_kitty.jpeg"),
    # MCL data_loader.py@1ce3f44:515-532, the numbers of ARGD's grid; config.py:38-44: NAD's target and rate
    ("mcldef", "released"): Config(noise="grid"),
}


def requires(config: Config) -> frozenset[str]:
    return frozenset({"arrays"} if config.noise == "file" else ())


def prepare(config: Config, context: Context) -> dict[str, Tensor]:
    """fresh-grey, grid: {}; else {"pattern": uint8 (3, H, W)}, for fixed-rgb uniform in 0..255."""
    height, width = context.images.shape[2:]
    if config.noise in ("fresh-grey", "grid"):
        return {}
    if config.noise == "drawing":
        return {"pattern": drawing(height, width)}
    if config.noise == "file":
        return {"pattern": resized(np.asarray(context.array(config.picture)), height, width)}
    rng = generator(context.seed, "blend-pattern")
    return {"pattern": torch.randint(256, context.images.shape[1:], generator=rng, dtype=torch.uint8)}


def drawing(height: int, width: int) -> Tensor:
    """A house under the sun, uint8 (3, H, W): large shapes of one colour each, painted one over the other."""
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    shapes = [
        (y >= 0, (120, 190, 240)),  # sky
        (y > 0.78, (80, 170, 70)),  # lawn
        ((y - 0.2)**2 + (x - 0.82)**2 < 0.13**2, (255, 215, 60)),  # sun
        ((y > 0.45) & (y < 0.9) & (abs(x - 0.4) < 0.28), (215, 70, 60)),  # wall
        ((y > 0.15) & (y <= 0.45) & (abs(x - 0.4) < 1.2 * (y - 0.15)), (90, 50, 110)),  # roof
        ((y > 0.6) & (y < 0.9) & (abs(x - 0.3) < 0.08), (60, 40, 30)),  # door
        ((y > 0.55) & (y < 0.72) & (abs(x - 0.53) < 0.09), (250, 250, 230)),  # window
    ]
    picture = np.zeros((height, width, 3), np.uint8)
    for inside, colour in shapes:
        picture[inside] = colour
    return torch.from_numpy(picture).permute(2, 0, 1).contiguous()


def resized(picture: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 (h, w, 3) -> uint8 (3, H, W), as torchvision's Resize does it for a picture in a file."""
    small = Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def grey_noise(images: Tensor, rng: np.random.RandomState) -> Tensor:
    """One grey noise picture per image, uint8 (N, 1, H, W): the draws of NAD's per-image loop, in one call."""
    count, _channels, height, width = images.shape
    return torch.from_numpy(rng.randint(0, 256, size=(count, 1, height, width), dtype=np.uint8))


def mix(images: Tensor, overlay: Tensor, ratio: float) -> Tensor:
    """(1 - ratio) * images + ratio * overlay, truncated to uint8.

    images: uint8 (N, 3, H, W); overlay: uint8 (1 or N, 1 or 3, H, W).
    With ratio = p / q: ((q - p) * x + p * k) // q, exact in 16 bits. numpy because torch has no uint16 arithmetic.
    """
    weight = Fraction(ratio).limit_denominator(100)
    p, q = weight.numerator, weight.denominator
    source, over = images.cpu().numpy(), overlay.expand(-1, *images.shape[1:]).numpy()
    mixed = torch.empty_like(images, device="cpu")
    target = mixed.numpy()
    for start in range(0, len(images), 64):  # small enough to stay in the processor's cache
        part = slice(start, start + 64)
        layer = np.empty_like(source[part])  # in the memory order of the images, which makes the sum one sweep
        for channel in range(layer.shape[1]):
            layer[:, channel] = (over if len(over) == 1 else over[part])[:, channel]
        target[part] = (source[part] * np.uint16(q - p) + layer * np.uint16(p)) // np.uint16(q)
    return mixed.to(images.device)


def apply(images: Tensor, config: Config, state: dict[str, Tensor], seed: int, split: str) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W)."""
    if config.noise == "grid":
        grid = torch.tensor(CENTRE_GRID, dtype=torch.uint8)[None, None]
        box = (..., slice(CENTRE, CENTRE + grid.shape[2]), slice(CENTRE, CENTRE + grid.shape[3]))
        result = images.clone()
        result[box] = mix(images[box], grid, config.ratio)
        return result
    if config.noise == "fresh-grey":
        noise = grey_noise(images, np.random.RandomState(derive(seed, "blend-noise", split) % 2**32))
    else:
        noise = state["pattern"][None]
    return mix(images, noise, config.ratio)


def poison(images: Tensor, labels: Tensor, config: Config, state: dict[str, Tensor], seed: int,
           num_classes: int) -> Poisoned:
    """images: uint8 (N, 3, H, W); labels: int64 (N,)."""
    return poison_with_trigger(images, labels, config, seed, num_classes,
                               lambda chosen: apply(chosen, config, state, seed, "train"))
