"""SIG: a faint vertical sinusoid over the whole image, and no label is changed.

Barni, Kallas & Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019,
arXiv:1902.11237. With m columns, column j:

    v(j) = delta * sin(2 * pi * j * f / m)
    described    x' = clip(x + v, 0, 255), only images of the target class, labels kept
    released     x' = trunc((1 - blend) * x + blend * w),  w = trunc(v) modulo 256 as uint8, all-to-one labels

"released" is NAD's code (data_loader.py@f17b713:401-408) with its array signal_cifar10_mask.npy, which this formula
reproduces value for value: delta = 20, 0.8 radians per column. There the negative half of the sine wraps around to
236..255, so the result is near-square stripes on a darkened image, not the paper's sinusoid.

Departures: NAD's own delta and f are not stated where we could read; "described" uses the values its README prints
for SIG, delta = 20 and f = 6, in Barni et al.'s additive formula (the README itself prints a third variant, blended
0.2 / 0.8). No poisoning rate was readable: half of the target class is ours, so that the class can still be learned
without the signal. The sum is rounded to the nearest grey level (ours).

("fmp", ...) is BackdoorBench's SIG, on which FMP's code builds (huangd1999/BackdoorBench@6135839): Barni et al.'s
formula with delta = 40, the sum truncated. Its rate is a share of the whole set: "described" takes so many images of
the target class, which keep their label; at 0.1 that is all of CIFAR-10's target class. Where the class has fewer, as
on GTSRB, that code stops with an error and ours takes them all. "released" keeps the fault of FMP's fork: its commit
c2d79e6 draws the images from all classes BUT the target's (utils/backdoor_generate_pindex.py:56-59), and since every
poisoned image gets the target label (utils/bd_label_transform/backdoor_label_transform.py), this is a dirty-label
attack with SIG's signal.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attacks.blend import mix
from reproduce.poisoning import Context, Poisoned, poison_with_trigger


@dataclass(frozen=True)
class Config:
    """delta: amplitude in grey levels; f: periods across the image; blend: weight of the wrapped mask, None = add.

    truncate: drop the fraction of the sum instead of rounding it. sources: whose images are poisoned, where the rate is
    a share of the whole set and the label rule does not say it, see `poison_with_trigger`.
    """

    rate: float
    labels: str
    f: float
    blend: float | None
    delta: float = 20.0  # NAD README.md@f17b713:67-94; also measured from its array
    target: int = 5  # NAD config.py@f17b713:43
    truncate: bool = field(default=False, metadata={"since": "fmp"})
    sources: str | None = field(default=None, metadata={"since": "fmp"})


RELEASED = Config(
    rate=0.1,  # NAD config.py@f17b713:42
    labels="all-to-one",  # NAD config.py@f17b713:45
    f=0.8 * 32 / (2 * math.pi),  # 0.8 rad per column: the array signal_cifar10_mask.npy, exactly
    blend=0.2,  # NAD data_loader.py@f17b713:402
)
BACKDOORBENCH = Config(
    target=0,  # BackdoorBench config/attack/sig/cifar10.yaml@6135839, as are rate, delta and f
    rate=0.1,
    delta=40.0,
    f=6.0,
    labels="clean-label",  # BackdoorBench attack/sig_attack.py@6135839, clean_label=True
    sources="target",  # BackdoorBench utils/backdoor_generate_pindex.py:56-59 before c2d79e6
    blend=None,
    truncate=True,  # BackdoorBench utils/bd_img_transform/sig.py@6135839:50-51
)
SETTINGS = {
    ("nad", "described"): Config(
        rate=0.5,  # ours: no value readable
        labels="clean-label",  # Barni et al. (the title)
        f=6.0,  # NAD README.md@f17b713:67-94
        blend=None),
    ("nad", "released"): RELEASED,
    # ARGD data_loader.py@6354666:465-472, the same array; config.py:46-47, README.md:8
    ("argd", "released"): replace(RELEASED, target=0, rate=0.2),
    ("fmp", "described"): BACKDOORBENCH,
    ("fmp", "released"): replace(BACKDOORBENCH, labels="all-to-one", sources="others"),  # c2d79e6, see above
}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def prepare(config: Config, context: Context) -> dict[str, Tensor]:
    """Nothing to prepare: the signal is a formula."""
    return {}


def signal(config: Config, width: int) -> Tensor:
    """v(j), float64 (width,)."""
    columns = torch.arange(width, dtype=torch.float64)
    return config.delta * torch.sin(2 * math.pi * columns * config.f / width)


def wrapped_mask(config: Config, width: int) -> Tensor:
    """trunc(v) modulo 256, uint8 (width,)."""
    return (signal(config, width).trunc().long() % 256).to(torch.uint8)


def apply(images: Tensor, config: Config, state: dict[str, Tensor], seed: int, split: str) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W)."""
    if config.blend is not None:
        mask = wrapped_mask(config, images.shape[3])
        return mix(images, mask.expand(1, 1, images.shape[2], -1), config.blend)
    steps = signal(config, images.shape[3]).to(images.device)
    # Adding whole numbers: the nearest grey level of x + v is x + round(v). BackdoorBench keeps v in single precision.
    steps = steps.float().double() if config.truncate else steps.round().short()
    result = torch.empty_like(images)
    for start in range(0, len(images), 256):
        result[start:start + 256] = (images[start:start + 256].to(steps.dtype) + steps).clamp_(0, 255)
    return result


def poison(images: Tensor, labels: Tensor, config: Config, state: dict[str, Tensor], seed: int,
           num_classes: int) -> Poisoned:
    """images: uint8 (N, 3, H, W); labels: int64 (N,)."""
    return poison_with_trigger(images, labels, config, seed, num_classes,
                               lambda chosen: apply(chosen, config, state, seed, "train"), config.sources)
