"""WaNet: the trigger is a smooth warping of the whole image, too small to be seen; nothing is pasted on.

Nguyen & Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021, arXiv:2102.10369. The attacker trains
the victim. A k x k grid of random offsets P is fixed once; phi is the identity grid in [-1, 1]^2, H the image's height:

    P     = U(-1, 1)^(k x k x 2),  divided by mean |P|
    M     = clip(phi + s / H * bicubic(P, H x H))       the warping field, clip to [-1, 1]
    M_n   = clip(M + U(-1, 1) / H)                      noise mode: fresh offsets for every pixel of every image
    x'    = bilinear(x, M)

Of each batch the first part (rate) is warped by M and gets the target label, the next (rate * cross) is warped by a
fresh M_n and keeps its true label, so that no warping but M is the trigger; the rest is left alone.

Constants: VinAIResearch/Warping-based_Backdoor_Attack-release@45e8c33. ("mcldef", "described") is WaNet with target,
rate and label rule of MCLDef's comparison (Zhihao151/MCL@1ce3f44, whose README points to the code above; its own
"wanetTrigger" returns the image as it is).

Departures. Images are augmented first and warped then, so the victim sees the field where the test images carry it;
the released code crops, rotates and flips the warped image, field and all. Epochs, rates and augmentation are the
victim's recipe (released: 1000 epochs at a rate of 0.01). Of a batch too small to poison one image of, one is poisoned
now and then (`poisoned_in_batch`), where the released code never poisons any. In training the warped image stays in
floating point; at test it is an image of 8 bits per channel, rounded to the nearest grey level.

("fmp", "described") is BackdoorBench's WaNet, on which FMP's code builds (huangd1999/BackdoorBench@6135839): the
constants of the released code and the rule for low rates. Left out: the random crops by up to 5 pixels and rotations by
up to 10 degrees that follow its warping. Its test images are truncated to 8 bits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.poisoning import Context, poisoned_in_batch, triggered_labels
from reproduce.rng import generator
from reproduce.training import Checkpoint, Loss, LossFunction, Observer, Recipe, silent, train


@dataclass(frozen=True)
class Config:
    """k: side of the grid of offsets; s: their strength in pixels; cross: noise images per poisoned one."""

    target: int
    rate: float = 0.1  # config.py:24
    labels: str = "all-to-one"  # config.py:14
    k: int = 4  # config.py:31
    s: float = 0.5  # config.py:30
    grid_rescale: float = 1.0  # config.py:32-34
    cross: float = 2.0  # config.py:25; at least 1, or rates below one image per batch poison nothing


SETTINGS = {
    ("mcldef", "described"): Config(target=5),  # MCL config.py@1ce3f44:38-42, as are rate and labels
    ("wanet", "released"): Config(target=0),  # config.py:23
    ("fmp", "described"): Config(target=0),  # BackdoorBench config/attack/wanet/cifar10.yaml@6135839, all values
}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def prepare(config: Config, context: Context) -> dict[str, Tensor]:
    """{"field": float32 (H, H, 2)}, M: for each pixel the (column, row) in [-1, 1] it is taken from."""
    offsets = torch.rand(1, 2, config.k, config.k, generator=generator(context.seed, "wanet-offsets")) * 2 - 1
    return {"field": field(offsets, config, context.images.shape[2])}


def field(offsets: Tensor, config: Config, size: int) -> Tensor:
    """M for P before its division, (1, 2, k, k) -> (size, size, 2)."""
    offsets = offsets / offsets.abs().mean()
    smooth = F.interpolate(offsets, size=size, mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    rows, columns = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    identity = torch.stack((columns, rows), 2)
    return ((identity + config.s * smooth / size) * config.grid_rescale).clamp(-1, 1).contiguous()


def noisy_fields(fixed: Tensor, noise: Tensor) -> Tensor:
    """M_n for each image. fixed: M, (H, H, 2); noise: uniform in [-1, 1], (N, H, H, 2), as the result."""
    return (fixed + noise / len(fixed)).clamp(-1, 1)


def warp(images: Tensor, fields: Tensor) -> Tensor:
    """images: float (N, 3, H, H); fields: (N, H, H, 2)."""
    return F.grid_sample(images.contiguous(), fields, mode="bilinear", align_corners=True)


def apply(images: Tensor, config: Config, state: dict[str, Tensor], seed: int, split: str) -> Tensor:
    """uint8 (N, 3, H, H) -> uint8 (N, 3, H, H)."""
    fixed, result = state["field"].to(images.device), torch.empty_like(images)
    for start in range(0, len(images), 256):
        part = images[start:start + 256].float()
        result[start:start + 256] = warp(part, fixed.expand(len(part), -1, -1, -1)).round_().clamp_(0, 255)
    return result


def implant(model: nn.Module, images: Tensor, labels: Tensor, config: Config, state: dict[str, Tensor], recipe: Recipe,
            seed: int, num_classes: int, observe: Observer = silent,
            checkpoint: Checkpoint | None = None) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train `model` in place on clean uint8 images (N, 3, H, H), poisoning every batch anew; the state stays."""
    size = images.shape[2]

    def noise(count: int, rng: torch.Generator) -> Tensor:
        noisy = int(poisoned_in_batch(count, config.rate, rng) * config.cross)
        return torch.rand(noisy, size, size, 2, generator=rng) * 2 - 1

    loss = poisoned_loss(state["field"].to(images.device), config, num_classes)
    history = train(model, images, labels, recipe, seed, phase="victim", loss=loss, observe=observe,
                    checkpoint=checkpoint, extra=noise)
    return history, state


def poisoned_loss(fixed: Tensor, config: Config, num_classes: int) -> LossFunction:
    """The classification loss on a clean batch, after part of it is warped and relabelled. fixed: M, (H, H, 2)."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor, noise: Tensor) -> Loss:
        noisy = len(noise)
        poisoned = int(len(images) * config.rate) or int(noisy > 0)  # noise images come with poisoned ones only
        fields = torch.cat([fixed.expand(poisoned, -1, -1, -1), noisy_fields(fixed, noise)])
        warped, clean = warp(images[:poisoned + noisy], fields), images[poisoned + noisy:]
        inputs = torch.cat([warped, clean]).contiguous(memory_format=torch.channels_last)
        wanted = torch.cat([triggered_labels(labels[:poisoned], config, num_classes), labels[poisoned:]])
        logits = model(inputs)
        return Loss(F.cross_entropy(logits.float(), wanted), logits, labels=wanted)

    return loss
