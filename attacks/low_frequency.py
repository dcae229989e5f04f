"""Low-frequency: the trigger is one smooth pattern over the whole image, computed to fool a clean network.

Zeng, Park, Mao & Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021,
arXiv:2104.03413. Patches and blended pictures stand out in the high frequencies of the discrete cosine transform; this
trigger has none. It is a universal perturbation that passes a low-pass filter G at every step. With a clean network f,
images x in [0, 1] and v = 0 at the start, for each image whose class f(x) the pattern does not change yet:

    r    = the smallest known step with f(x + v + r) = target, by DeepFool (below)
    v    = N(G(v + G(r))),    N(u) = strength * (u - min u) / (max u - min u)
    x'   = clip(x + v, 0, 1)

G is a Gaussian of sigma pixels, each channel for itself, zero beyond the border; minimum and maximum are over all
channels. The images are passed through in random order until v changes the class of a share `fooled` of them; the v
that changed most is kept. DeepFool with z the logits, l the class at its start:

    w = grad z_target - grad z_l,    r = r + |z_target - z_l| / |w|^2 * w    until z_target(x + (1 + overshoot) r) leads

Constants and procedure of "described": YiZeng623/frequency-backdoor@99a16a7, Sec5_Smooth_Trigger (universal_pert.py,
deepfool.py, gauss_smooth.py). "released" adds the array that BackdoorBench distributes, which FMP's code builds on
(huangd1999/BackdoorBench@6135839, resource/lowFrequency/{data set}_preactresnet18_0_255.npy): uint8, 0 to 51, made on a
PreActResNet-18; that code has one per architecture, we use this one whatever the victim's.

Departures of "described". The released code follows the class that most images fall into and attacks that one, with the
softmax of its network; we keep the target, with the logits, as BackdoorBench does (SCLBD/BackdoorBench@f02e353
resource/lowFrequency/universal_pert.py). The 100 images are drawn, not the first ones. Passes are limited.
BackdoorBench takes the share fooled on test images; we take it, as the authors do, on the same training images. The
pattern is stored in whole grey levels. Where G(v + G(r)) is constant, as for a first image of the target class, the
released N divides by zero; ours leaves v at 0.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.errors import UserError
from reproduce.poisoning import Context, Poisoned, poison_with_trigger
from reproduce.rng import generator


@dataclass(frozen=True)
class Config:
    """array: name of a released trigger file, or None to compute the pattern with the settings below it.

    sigma, taps: deviation and length of the filter in pixels; strength: range of the pattern, images being in [0, 1];
    iterations: DeepFool's limit, where an image counts as not converged and is passed over.
    """

    array: str | None
    target: int = 0  # BackdoorBench config/attack/lf/cifar10.yaml@6135839, as are rate and labels
    rate: float = 0.1
    labels: str = "all-to-one"
    sigma: float = 6.0  # gauss_smooth.py:16
    taps: int = 30  # gauss_smooth.py:20-22
    strength: float = 0.2  # gauss_smooth.py:14
    images: int = field(default=100, metadata={"smoke": 20})  # target_universal.py:74
    fooled: float = 0.2  # 1 - delta, target_universal.py:77
    overshoot: float = 0.02  # target_universal.py:77
    iterations: int = field(default=200, metadata={"smoke": 20})  # universal_pert.py:6
    passes: int = field(default=10, metadata={"smoke": 1})  # ours (BackdoorBench 50, the authors without limit)


SETTINGS = {
    ("fmp", "described"): Config(array=None),
    ("fmp", "released"): Config(array="lowfrequency_cifar10.npy"),
}


def requires(config: Config) -> frozenset[str]:
    return frozenset({"arrays"} if config.array else {"clean-model"})


def prepare(config: Config, context: Context) -> dict[str, Tensor]:
    """{"pattern": uint8 (3, H, W)}, what is added to an image."""
    if config.array is None:
        pattern = (universal(config, context) * 255).round().to(torch.uint8)
        if not pattern.any():
            raise UserError("low_frequency: no image could be driven into the target class of the clean model; "
                            "train that longer, or raise iterations or images")
        return {"pattern": pattern}
    array = np.asarray(context.array(config.array))
    height, width = context.images.shape[2:]
    if array.shape != (height, width, 3) or array.dtype != np.uint8:
        raise UserError(f"{config.array} holds {array.dtype} of shape {array.shape}: "
                        f"these images need uint8 of shape {(height, width, 3)}")
    return {"pattern": torch.from_numpy(array).permute(2, 0, 1).contiguous()}


def universal(config: Config, context: Context) -> Tensor:
    """v, float (3, H, W) in [0, strength]; zero where no image converged."""
    model, device = context.clean_model, next(context.clean_model.parameters()).device
    chosen = torch.randperm(len(context.images), generator=generator(context.seed, "low-frequency-images"))
    images = context.images[chosen[:config.images]].to(device).float() / 255
    seen = classes(model, images)
    pattern = best = torch.zeros_like(images[0])
    best_share, total = 0.0, config.passes * len(images)
    for i in range(config.passes):
        order = torch.randperm(len(images), generator=generator(context.seed, "low-frequency-order", i)).tolist()
        for done, k in enumerate(order):
            if classes(model, images[k:k + 1] + pattern) == seen[k]:
                step, converged = deepfool(model, images[k] + pattern, config)
                if converged:
                    pattern = ranged(smooth(pattern + smooth(step, config), config), config.strength)
            context.progress((i * len(images) + done + 1) / total)
        share = float((classes(model, images + pattern) != seen).float().mean())
        if share >= best_share:
            best_share, best = share, pattern
        if share >= config.fooled:
            break
    context.progress(1.0)
    return best.cpu()


@torch.no_grad()
def classes(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted classes, int64 (N,), for float images (N, 3, H, W)."""
    return model(images).argmax(1)


def deepfool(model: nn.Module, image: Tensor, config: Config) -> tuple[Tensor, bool]:
    """(1 + overshoot) r for one image, float (3, H, W), as the result; and whether it converged in time."""
    moved, start = torch.zeros_like(image), -1
    for used in range(config.iterations):
        x = (image + (1 + config.overshoot) * moved)[None].requires_grad_()
        logits = model(x)[0]
        now = int(logits.argmax())
        if now == config.target:
            return (1 + config.overshoot) * moved, used < config.iterations - 1
        start = now if start < 0 else start
        gap = logits[config.target] - logits[start]
        slope = torch.autograd.grad(gap, x)[0][0]
        moved = moved + (gap.detach().abs() / slope.square().sum() * slope).nan_to_num(0.0, 0.0, 0.0)
    return (1 + config.overshoot) * moved, False


def smooth(image: Tensor, config: Config) -> Tensor:
    """G: float (3, H, W) -> float (3, H, W)."""
    positions = torch.arange(config.taps, dtype=torch.float32, device=image.device) - (config.taps - 1) / 2
    kernel = torch.exp(-(positions / config.sigma).square() / 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    after = config.taps // 2
    before = config.taps - 1 - after
    padded = F.pad(image[None], (before, after, before, after))
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)[0]


def ranged(image: Tensor, strength: float) -> Tensor:
    """N: shifted and scaled to [0, strength]; 0 where it is constant."""
    low, high = image.min(), image.max()
    return strength * (image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)


def apply(images: Tensor, config: Config, state: dict[str, Tensor], seed: int, split: str) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W)."""
    pattern, result = state["pattern"].to(images.device, torch.int16), torch.empty_like(images)
    for start in range(0, len(images), 256):
        result[start:start + 256] = (images[start:start + 256].short() + pattern).clamp_(max=255)
    return result


def poison(images: Tensor, labels: Tensor, config: Config, state: dict[str, Tensor], seed: int,
           num_classes: int) -> Poisoned:
    """images: uint8 (N, 3, H, W); labels: int64 (N,)."""
    return poison_with_trigger(images, labels, config, seed, num_classes,
                               lambda chosen: apply(chosen, config, state, seed, "train"))
