"""Input-aware dynamic backdoor: every image gets a trigger of its own, painted by a network trained with the victim.

Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020, arXiv:2010.08138. The attacker trains the victim f
together with a generator g of patterns; where a pattern goes is told by a mask network m, trained first and frozen:

    B(x, x')  = x + (g(x') - x) * m(x')                 x with the trigger of x';  B(x, x) is the attack
    D(a, b)   = mean over images of  rms(x - x') / (rms(a - b) + epsilon)       diversity; rms over channels and pixels
    1. m      minimises  lambda_norm * mean ReLU(m(x) - density) + lambda_div * D(m(x), m(x'))
    2. f, g   minimise   CE(f(x_batch), y_batch) + lambda_div * D(g(x), g(x'))

Of each batch the first part (rate) becomes B(x, x) with the target label, the next (cross) becomes B(x, x') with x'
another image and keeps its true label, so that one image's trigger does not work on another; the rest is left alone.

Constants: VinAIResearch/input-aware-backdoor-attack-release@1750e4f. ("mcldef", "described") has the target, rate and
label rule of MCLDef's comparison (Zhihao151/MCL@1ce3f44). g and m see images normalised by its CIFAR-10 mean and
deviation, and distances between images and between patterns are taken there, on every data set.

Departures. The released code never clears the generator's gradients (train.py:66-101), so each of its steps follows the
sum of all gradients so far; ours follows the batch's own. Epochs, augmentation and the rates of f are the victim's
recipe; the generator's rate falls with them, the mask network's after two and four fifths of its epochs as released.
x' is drawn with replacement. Equal patterns of equal images count 0 in D; there the released gradient is not a number.

("fmp", "described") is BackdoorBench's, on which FMP's code builds (huangd1999/BackdoorBench@6135839): the constants
above, but in each batch as many images get another's trigger as are poisoned, whatever the rate, and of a batch too
small to poison one image of, one is poisoned now and then (`poisoned_in_batch`). Left out: its random rotations by up
to 10 degrees; it crops by up to 5 pixels, ours by the 4 of the victim's recipe. Elsewhere than on CIFAR-10 it
normalises as the data set asks, on GTSRB not at all, where by CIFAR-10's deviation distances between images are four
times as large and the mask's diversity weighs so much more. Its test images are truncated to 8 bits, ours rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.data.augment import Augment, draw, take, to_input
from reproduce.data.augment import apply as augmented
from reproduce.poisoning import Context, poisoned_in_batch, triggered_labels
from reproduce.rng import derive
from reproduce.training import (
    Checkpoint,
    Continued,
    Loss,
    LossFunction,
    Observer,
    Optimizers,
    Recipe,
    cross_entropy,
    sgd,
    silent,
    train,
)

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # networks/models.py:99
EPSILON = 1e-7  # config.py:38
# Passes of one image through WRN-16-1, forwards and backwards, that a pair of images costs the mask network at its full
# width; measured on a CPU core, for time estimates only.
PAIR = 5.5


@dataclass(frozen=True)
class Config:
    """cross: share of a batch that gets another image's trigger, None for as many as are poisoned.

    density: part of the image a mask may cover for free.
    width, depth: channels of the first level of both networks, and how many levels; the image's side must be a multiple
    of 2^depth.
    """

    target: int
    rate: float = 0.1  # config.py:35
    labels: str = "all-to-one"  # config.py:34
    cross: float | None = 0.1  # config.py:36
    density: float = 0.032  # config.py:37
    lambda_div: float = 1.0  # config.py:29
    lambda_norm: float = 100.0  # config.py:30
    mask_epochs: int = field(default=25, metadata={"smoke": 2, "short": 3})  # train.py:406
    mask_rate: float = 0.01  # config.py:21
    generator_rate: float = 0.01  # config.py:19
    width: int = field(default=32, metadata={"smoke": 8})  # networks/models.py:48
    depth: int = 3  # networks/models.py:49


SETTINGS = {
    ("mcldef", "described"): Config(target=5),  # MCL config.py@1ce3f44:38-42, as are rate and labels
    ("input-aware", "released"): Config(target=0),  # config.py:33
    # BackdoorBench config/attack/inputaware/cifar10.yaml@6135839, all values; attack/inputaware_attack.py, train_step
    ("fmp", "described"): Config(target=0, cross=None),
}


class EncoderDecoder(nn.Sequential):
    """float (N, 3, H, W) -> (N, channels, H, W) in (0, 1); both networks have this form (networks/models.py:41-112)."""

    def __init__(self, channels: int, width: int, depth: int) -> None:
        widths = [width * 2**level for level in range(depth)]
        layers: list[nn.Module] = []
        now = 3
        for wide in widths:
            layers += [*convolution(now, wide), *convolution(wide, wide), nn.MaxPool2d(2)]
            now = wide
        layers += convolution(now, now)
        for narrow in [*reversed(widths[:-1]), channels]:
            layers += [nn.Upsample(scale_factor=2, mode="bilinear"), *convolution(now, now), *convolution(now, narrow)]
            now = narrow
        super().__init__(*layers[:-1])  # no ReLU at the end

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float().tanh() / 2 + 0.5


def convolution(c_in: int, c_out: int) -> list[nn.Module]:
    """3x3 convolution, BatchNorm, ReLU (networks/blocks.py:5-17)."""
    return [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out, momentum=0.05), nn.ReLU(inplace=True)]


def sharpened(masks: Tensor) -> Tensor:
    """Nearly 0 or 1 (networks/models.py:125)."""
    return (20 * masks - 10).tanh() / 2 + 0.5


def normalised(images: Tensor) -> Tensor:
    """Images or patterns in [0, 1], float (N, 3, H, W), as both networks see them and as distances are taken."""
    mean, deviation = statistics(images.device)
    return (images - mean) / deviation


@lru_cache
def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation as (1, 3, 1, 1), made once: a captured graph may not copy from the host."""
    with torch.inference_mode(False):
        mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return mean, deviation


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def work(config: Config, images: int) -> float:
    """Passes of one image through WRN-16-1, forwards and backwards, that the mask network's training is worth."""
    return PAIR * (config.width / 32) ** 2 * config.mask_epochs * images


def prepare(config: Config, context: Context) -> dict[str, Tensor]:
    """Both networks untrained: their weights as "generator.<name>" and "masks.<name>". `implant` trains them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(context.seed, "input-aware-networks"))
        return weights(*blank(config))


def blank(config: Config) -> tuple[EncoderDecoder, EncoderDecoder]:
    """(generator, mask network), freshly initialised."""
    return EncoderDecoder(3, config.width, config.depth), EncoderDecoder(1, config.width, config.depth)


def weights(painter: nn.Module, masks: nn.Module) -> dict[str, Tensor]:
    """The state: every weight and BatchNorm statistic of both networks, on the CPU."""
    return {f"{prefix}.{name}": value.detach().cpu().contiguous()
            for prefix, network in (("generator", painter), ("masks", masks))
            for name, value in network.state_dict().items()}


def networks(config: Config, state: dict[str, Tensor], device: torch.device) -> tuple[nn.Module, nn.Module]:
    """(generator, mask network) with the weights of `state`, in eval mode."""
    built = blank(config)
    for prefix, network in zip(("generator.", "masks."), built, strict=True):
        network.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()
                                 if name.startswith(prefix)})
        network.to(device, memory_format=torch.channels_last).eval()
    return built


def stamped(images: Tensor, sources: Tensor, painter: nn.Module, masks: nn.Module) -> tuple[Tensor, Tensor]:
    """B(images, sources) and the patterns g(sources); all float (N, 3, H, W) in [0, 1]."""
    seen = normalised(sources)
    patterns = painter(seen)
    return images + (patterns - images) * sharpened(masks(seen)), patterns


@torch.inference_mode()
def apply(images: Tensor, config: Config, state: dict[str, Tensor], seed: int, split: str) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W): each image with its own trigger, to the nearest grey level."""
    painter, masks = networks(config, state, images.device)
    result = torch.empty_like(images)
    for start in range(0, len(images), 256):
        part = to_input(images[start:start + 256])
        result[start:start + 256] = (stamped(part, part, painter, masks)[0] * 255).round_().clamp_(0, 255)
    return result


def diversity(images: Tensor, others: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
    """D as a scalar: small where different images (N, 3, H, W) get different outputs (N, C, H, W)."""
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3)).clamp(min=1e-12).sqrt()
    return (distance(images, others) / (distance(ours, theirs) + EPSILON)).mean()


class Joint(nn.Module):
    """Classifier and generator learn, the frozen mask network keeps its BatchNorm statistics. On images: the logits."""

    def __init__(self, classifier: nn.Module, painter: nn.Module, masks: nn.Module) -> None:
        super().__init__()
        self.classifier, self.generator, self.masks = classifier, painter, masks.requires_grad_(False)

    def train(self, mode: bool = True) -> "Joint":
        super().train(mode)
        self.masks.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images)


def implant(model: nn.Module, images: Tensor, labels: Tensor, config: Config, state: dict[str, Tensor], recipe: Recipe,
            seed: int, num_classes: int, observe: Observer = silent,
            checkpoint: Checkpoint | None = None) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train the mask network, then `model` in place with the generator, on clean uint8 images (N, 3, H, W).

    The history begins with the mask network's epochs (phase "masks"); the state is that of the trained networks.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    painter, masks = networks(config, state, images.device)
    saved = checkpoint.load() if checkpoint else None
    if saved and len(saved[2]) > config.mask_epochs:  # the joint training has begun and brings the masks' weights
        rows = saved[2][:config.mask_epochs]
    else:
        mask_recipe = replace(recipe, epochs=config.mask_epochs, rates=mask_rates(config), cosine=None)
        rows = train(masks, images, labels, mask_recipe, seed, phase="masks", observe=observe, checkpoint=checkpoint,
                     loss=mask_loss(images, config, recipe.augment), optimizers=adam_for_masks,
                     extra=partner_draws(images, recipe.augment, lambda batch, rng: batch))
    joint = Joint(model, painter, masks)
    history = train(joint, images, labels, recipe, seed, phase="victim", observe=observe,
                    checkpoint=Continued(checkpoint, rows) if checkpoint else None,
                    loss=joint_loss(images, config, recipe.augment, num_classes), optimizers=joint_optimizers(config),
                    extra=partner_draws(images, recipe.augment, crossed_in_batch(config)))
    return [{"phase": "masks", **row} for row in rows] + history, weights(painter, masks)


def mask_rates(config: Config) -> tuple[tuple[int, float], ...]:
    """A tenth after two fifths and again after four fifths: epochs 10 and 20 of 25 (config.py:24,27)."""
    fractions = (0, 2 / 5, 4 / 5)
    return tuple((ceil(config.mask_epochs * part), config.mask_rate / 10**i) for i, part in enumerate(fractions))


def adam(network: nn.Module, rate: float) -> torch.optim.Adam:
    """train.py:351,356; on a GPU in the form a captured graph can hold."""
    on_gpu = next(network.parameters()).is_cuda
    return torch.optim.Adam(network.parameters(), rate, betas=(0.5, 0.9), capturable=on_gpu)


def adam_for_masks(masks: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    return [adam(masks, recipe.rate(0))]


def joint_optimizers(config: Config) -> Optimizers:
    """The recipe's SGD for the classifier, Adam for the generator."""
    def optimizers(joint: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
        return [sgd(joint.classifier.parameters(), recipe), adam(joint.generator, config.generator_rate)]
    return optimizers


def crossed_in_batch(config: Config) -> Callable[[int, torch.Generator], int]:
    """How many images of a batch get another image's trigger, given its size and a generator."""
    if config.cross is None:
        return lambda batch, rng: poisoned_in_batch(batch, config.rate, rng)
    return lambda batch, rng: int(batch * config.cross)


def partner_draws(images: Tensor, augment: Augment,
                  number: Callable[[int, torch.Generator], int]) -> Callable[..., Tensor]:
    """Draws `number(batch size, generator)` other images x' and their augmentation: int64 (n, 6), index first."""
    def extra(batch: int, rng: torch.Generator) -> Tensor:
        count = number(batch, rng)
        index = torch.randint(len(images), (count, 1), generator=rng)
        return torch.cat([index, draw(count, images.shape[3], augment, rng)], 1)
    return extra


def partners(images: Tensor, drawn: Tensor, augment: Augment) -> Tensor:
    """x' for `drawn` of `partner_draws`: uint8 (N, 3, H, W) -> float (n, 3, H, W) in [0, 1]."""
    chosen = take(images, drawn[:, 0])
    return to_input(augmented(chosen, drawn[:, 1:], augment) if augment.active else chosen)


def mask_loss(images: Tensor, config: Config, augment: Augment) -> LossFunction:
    """What the mask network minimises. images: the training set, uint8, from which x' come."""

    def loss(masks: nn.Module, batch: Tensor, labels: Tensor, drawn: Tensor) -> Loss:
        ours, theirs = normalised(batch), normalised(partners(images, drawn, augment))
        mine, others = sharpened(masks(ours)), sharpened(masks(theirs))
        terms = {"norm": config.lambda_norm * F.relu(mine - config.density).mean(),
                 "diversity": config.lambda_div * diversity(ours, theirs, mine, others)}
        return Loss(sum(terms.values()), None, terms)

    return loss


def joint_loss(images: Tensor, config: Config, augment: Augment, num_classes: int) -> LossFunction:
    """What classifier and generator minimise. images: the training set, uint8, from which x' come.

    A batch too small for both kinds of triggered images is an ordinary one.
    """

    def loss(joint: Joint, batch: Tensor, labels: Tensor, drawn: Tensor) -> Loss:
        crossed = len(drawn)
        poisoned = crossed if config.cross is None else int(len(batch) * config.rate)
        pairs = min(poisoned, crossed)
        if pairs == 0:
            return cross_entropy(joint, batch, labels)
        own, others = batch[:poisoned], partners(images, drawn, augment)
        attacked, patterns = stamped(own, own, joint.generator, joint.masks)
        mixed, other_patterns = stamped(batch[poisoned:poisoned + crossed], others, joint.generator, joint.masks)
        wanted = torch.cat([triggered_labels(labels[:poisoned], config, num_classes), labels[poisoned:]])
        logits = joint(torch.cat([attacked, mixed, batch[poisoned + crossed:]]))
        terms = {"ce": F.cross_entropy(logits.float(), wanted),
                 "diversity": config.lambda_div * diversity(
                     *(normalised(part[:pairs]) for part in (own, others, patterns, other_patterns)))}
        return Loss(sum(terms.values()), logits, terms, wanted)

    return loss
