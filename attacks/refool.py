"""Refool: the trigger is a natural reflection, as if the picture were taken through a window.

Liu, Ma, Bailey & Lu, "Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks", ECCV 2020,
arXiv:2007.02343. A reflection picture r, filtered by a kernel k, lies over the image x; sums are in linear light
(pixel^2.2), alpha is the share of light the window transmits:

    in focus        k = identity           x' = alpha * x + (1 - alpha) * r
    ghost           k = two shifted copies x' = alpha * x + (1 - alpha) * (g * r + (1 - g) * shift(r))
    out of focus    k = Gaussian(sigma)    x' = alpha * x + (1 - alpha / 2) * v * r',   v = exp(-(a^2 + b^2) / 4),
                    r' = clip(r - att * (mean of those values of x + r that exceed 1, minus 1)), per image and channel;
                    a, b run from -3 to 3 across the image (a vignette)

The kernels act at 560 pixels as in the authors' code (DreamtaleCore/Refool scripts/insert_reflection.py@9948043),
the result is reduced to the size of the images.

Departures: the authors blend 560-pixel images and reduce afterwards; we reduce the filtered reflection first (the same
up to the final gamma curve and the clipping) and give each photograph one filtered version of each type, with its own
sigma, shift and g. How often a reflection is in focus is not in that code (its function has ghost and blur only): ours.
Their search for the most effective reflections over 16 rounds of training, and their check that the mixture is neither
too similar nor too different (SSIM 0.7 to 0.85), are not implemented. They test with the photographs they train with;
here test reflections come from other photographs. The pictures the authors selected are themselves reflection layers
of their code, some nearly black; like BackdoorBench we filter them once more. NAD's rate is not stated where we could
read. At 32 pixels the blur and the shift are below one pixel, so the types differ mainly in strength and vignette.

`backdoorbench` is what BackdoorBench made of the attack after finding that the random strength often costs much of the
ASR (attack/refool.py@f02e353:9, config/attack/refool/default.yaml): a fixed, stronger reflection, filtered at the size
of the images, no reflection in focus. Ours differs from theirs in that test photographs stay disjoint.

("argd", "released") is ARGD's code (BililiCode/ARGD@6354666 data_loader.py:284-319,506-627): image 2 of the set at hand
is the reflection over all others, filtered at their size, over images of the target class only, whose label stays. So
the trigger learned is an image of the training set and the trigger tested another, of the test set. That code filters
anew for each image, we draw from `versions`; it stretches a ghost linearly, we cubically; it draws its share from all
classes and keeps the target's part, we take exactly that share of the target class.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from reproduce.poisoning import Context, Poisoned, poison_with_trigger
from reproduce.rng import generator

IN_FOCUS, OUT_OF_FOCUS, GHOST = 0, 1, 2  # row of the state's second axis
GAMMA = 2.2  # Refool insert_reflection.py@9948043:67


@dataclass(frozen=True)
class Config:
    """Ranges are (lowest, highest) of a uniform draw.

    own_image: the reflection is this image of the data set's training or test part; None: photographs.
    versions: how often each picture is filtered, with draws of its own.
    """

    target: int = 5  # NAD config.py@f17b713:43
    rate: float = 0.1  # NAD config.py@f17b713:42
    labels: str = "all-to-one"  # NAD config.py@f17b713:45
    ghost: float = 0.39  # Refool insert_reflection.py@9948043:185
    in_focus: float = 0.305  # ours: half of the rest
    transmitted: tuple[float, float] = (0.55, 0.95)  # Refool insert_reflection.py@9948043:64
    sigma: tuple[float, float] = (1.0, 5.0)  # Refool insert_reflection.py@9948043:98, in pixels of `size`
    shift: tuple[int, int] = (3, 8)  # Refool insert_reflection.py@9948043:72, in pixels of `size`
    ghost_share: tuple[float, float] = (0.15, 0.5)  # Refool insert_reflection.py@9948043:78; g or 1 - g, evenly
    attenuation: tuple[float, float] = (1.08, 1.18)  # Refool insert_reflection.py@9948043:108
    size: int = 560  # Refool insert_reflection.py@9948043:47
    own_image: int | None = field(default=None, metadata={"since": "argd"})
    versions: int = field(default=1, metadata={"since": "argd"})


SETTINGS = {
    ("nad", "described"): Config(),
    # BackdoorBench config/attack/refool/default.yaml@f02e353 (ghost_rate, alpha_t); attack/refool.py:233 (size)
    ("nad", "backdoorbench"): Config(ghost=0.49, in_focus=0.0, transmitted=(0.4, 0.4), size=32),
    ("argd", "released"): Config(
        target=0,  # ARGD config.py@6354666:47
        rate=0.2,  # ARGD config.py@6354666:46
        labels="clean-label",  # ARGD data_loader.py@6354666:284-297
        ghost=39 / 101,  # ARGD data_loader.py@6354666:506,525: randint(0, 100) < 39, both ends included
        in_focus=0.0,  # ARGD data_loader.py@6354666:525-
        size=32,  # ARGD data_loader.py@6354666:506
        own_image=2,  # ARGD data_loader.py@6354666:171
        versions=256),  # ours
}


def requires(config: Config) -> frozenset[str]:
    return frozenset({"pictures" if config.own_image is None else "own-images"})


def prepare(config: Config, context: Context) -> dict[str, Tensor]:
    """{"train", "test"}: uint8 (P, 3 types, 3, H, W), the filtered reflections in ordinary (gamma-coded) pixels."""
    def sources(split: str) -> Tensor:
        pictures = context.pictures[split]
        chosen = pictures if config.own_image is None else pictures[config.own_image, None]
        return chosen.repeat_interleave(config.versions, 0)

    return {split: filtered(sources(split), config, tuple(context.images.shape[2:]),
                            generator(context.seed, "refool-reflections", split), context.progress)
            for split in ("train", "test")}


def uniform(bounds: tuple[float, float], count: int, rng: torch.Generator) -> Tensor:
    """float (count,)."""
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(count, generator=rng)


def filtered(pictures: Tensor, config: Config, shape: tuple[int, int], rng: torch.Generator,
             progress=lambda share: None) -> Tensor:
    """Each photograph in focus, out of focus and doubled: uint8 (P, 3, h, w) -> (P, 3 types, 3, *shape)."""
    count = len(pictures)
    sigmas = uniform(config.sigma, count, rng)
    shifts = torch.randint(config.shift[0], config.shift[1] + 1, (count, 2), generator=rng)
    shares = uniform(config.ghost_share, count, rng)
    shares = torch.where(torch.rand(count, generator=rng) < 0.5, shares, 1 - shares)
    result = torch.empty(count, 3, 3, *shape, dtype=torch.uint8)
    for i in range(count):
        large = F.interpolate(pictures[i:i + 1].float() / 255, (config.size, config.size), mode="bicubic",
                              antialias=config.size < pictures.shape[-1])
        light = large.clamp_(0, 1).pow(GAMMA)
        versions = torch.cat([light, blurred(light, float(sigmas[i])),
                              doubled(light, *shifts[i].tolist(), float(shares[i]))])
        small = F.interpolate(versions, shape, mode="area")
        result[i] = (small.clamp_(0, 1).pow(1 / GAMMA) * 255).round().to(torch.uint8)
        progress((i + 1) / count)
    return result


def blurred(light: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with the authors' window of 2 * ceil(2 * sigma) + 1 pixels; (1, 3, h, w) -> (1, 3, h, w)."""
    radius = math.ceil(2 * sigma)
    kernel = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    rows = F.conv2d(F.pad(light, (radius, radius, 0, 0), mode="reflect"), kernel, groups=3)
    return F.conv2d(F.pad(rows, (0, 0, radius, radius), mode="reflect"), kernel.transpose(2, 3), groups=3)


def doubled(light: Tensor, down: int, right: int, share: float) -> Tensor:
    """share * light + (1 - share) * light shifted, on the part both cover; (1, 3, h, w), stretched back to its size."""
    ghost = share * light[:, :, down:, right:] + (1 - share) * light[:, :, :-down, :-right]
    return F.interpolate(ghost, light.shape[2:], mode="bicubic")


def apply(images: Tensor, config: Config, state: dict[str, Tensor], seed: int, split: str) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W); every image gets its own photograph, type and strength."""
    photographs, kinds, alphas, attenuations = draw(len(images), len(state[split]), config, seed, split)
    decode = (torch.arange(256) / 255).pow(GAMMA).to(images.device)
    reflections = state[split].to(images.device)
    shade = vignette(*images.shape[2:]).to(images.device)
    result = torch.empty_like(images)
    for start in range(0, len(images), 512):
        part = slice(start, start + 512)
        # In one memory order, so that the sums of `dimmed` do not depend on the caller's.
        x = decode[images[part].contiguous(memory_format=torch.channels_last).int()]
        r = decode[reflections[photographs[part], kinds[part]].int()]
        alpha = alphas[part].view(-1, 1, 1, 1).to(images.device)
        defocused = (kinds[part] == OUT_OF_FOCUS).view(-1, 1, 1, 1).to(images.device)
        att = attenuations[part].view(-1, 1, 1, 1).to(images.device)
        r = torch.where(defocused, dimmed(x, r, att) * shade * (1 - alpha / 2), (1 - alpha) * r)
        result[part] = (alpha * x + r).clamp_(0, 1).pow_(1 / GAMMA).mul_(255).to(torch.uint8)
    return result


def draw(count: int, photographs: int, config: Config, seed: int, split: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each of `count` images: photograph, type (both int64), transmitted share, attenuation; all (count,)."""
    rng = generator(seed, "refool-draw", split)
    index = torch.randint(photographs, (count,), generator=rng)
    u = torch.rand(count, generator=rng)
    kind = torch.full((count,), OUT_OF_FOCUS)
    kind[u < config.ghost + config.in_focus] = IN_FOCUS
    kind[u < config.ghost] = GHOST
    return index, kind, uniform(config.transmitted, count, rng), uniform(config.attenuation, count, rng)


def dimmed(x: Tensor, r: Tensor, attenuation: Tensor) -> Tensor:
    """Take the overexposure of x + r off the reflection; float (N, 3, H, W), attenuation (N, 1, 1, 1)."""
    total = x + r
    over = (total > 1).float()
    mean = (total * over).sum((2, 3), keepdim=True) / (over.sum((2, 3), keepdim=True) + 1e-6)
    return (r - (mean.clamp(min=1) - 1) * attenuation).clamp(0, 1)


def vignette(height: int, width: int) -> Tensor:
    """exp(-(a^2 + b^2) / 4) at the pixel centres of a square from -3 to 3; (height, width)."""
    a = (torch.arange(height) + 0.5) / height * 6 - 3
    b = (torch.arange(width) + 0.5) / width * 6 - 3
    return torch.exp(-(a[:, None] ** 2 + b**2) / 4)


def poison(images: Tensor, labels: Tensor, config: Config, state: dict[str, Tensor], seed: int,
           num_classes: int) -> Poisoned:
    """images: uint8 (N, 3, H, W); labels: int64 (N,)."""
    return poison_with_trigger(images, labels, config, seed, num_classes,
                               lambda chosen: apply(chosen, config, state, seed, "train"))
