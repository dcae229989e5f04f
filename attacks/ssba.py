"""SSBA (ISSBA): every image gets a trigger of its own, the faint trace a network leaves that hides a bit string in it.

Li, Li, Wu, Li, He & Lyu, "Invisible Backdoor Attack with Sample-Specific Triggers", ICCV 2021, arXiv:2012.03816; the
networks are StegaStamp's (Tancik, Mildenhall & Ng, CVPR 2020). An encoder E and a decoder D learn together on the clean
training images, each with random bits b, fresh at each step. Then a string s is drawn; E with s is the trigger:

    E, D minimise    BCE(D(E(x, b)), b) + weight(t) * mean (E(x, b) - x)^2        at step t
    weight(t)      = image_weight * clip to [0, 1] of (t - t_0 - wait) / ramp;  0 until t_0, the step after the first
                     that had more than `learned` of its bits read right
    x'             = E(x, s) to the nearest grey level,   y' = target

All images carry the same string, but the trace x' - x that carries it depends on the image.

FMP's victims are BackdoorBench's. Its attack swaps the poisoned images for stored outputs of such an encoder, made with
its resource/ssba (a fork of ningyu1991/ArtificialGANFingerprints@f4a4bcc). Constants: SCLBD/BackdoorBench@f02e353,
files of that folder; target, rate and label rule: config/attack/ssba/cifar10.yaml of huangd1999/BackdoorBench@6135839.

Departures. The stored images are not in those repositories, so the networks are trained here, small enough for minutes
on one core: on images of their own size (released: trained at 128x128, applied at 32x32), half as wide, halving the
image three times instead of four (E) and five (D), begun with other weights (`initialised`), in fewer steps at a higher
rate. s is drawn at random; released, it spells a word in an error-correcting code, which matters to nobody who only
trains a victim. As in BackdoorBench, E gives the image (--use_residual 0); ISSBA uses StegaStamp itself, whose E gives
what is added to it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.data.augment import take, to_input
from reproduce.poisoning import Context, Poisoned, poison_with_trigger
from reproduce.rng import generator

SIDE = 16  # models.py:21: of the map that the bits become, whatever the image's size


@dataclass(frozen=True)
class Config:
    """bits: length of the string; width: channels of the first level of both networks; depth: how often each halves
    the image; encoder_rate: their learning rate; held_out: images, a tenth of all at most, to measure the trigger on.
    """

    target: int
    rate: float = 0.1  # pratio
    labels: str = "all-to-one"  # attack_label_trans
    bits: int = field(default=100, metadata={"smoke": 8})  # readme.md (--fingerprint_length)
    width: int = field(default=16, metadata={"smoke": 8})  # ours: half of models.py:29, for one core
    depth: int = 3  # ours: to 4x4 pixels of 32x32
    steps: int = field(default=2000, metadata={"smoke": 150})  # ours: minutes on one core; readme.md: 20 epochs, 15,640
    batch: int = field(default=32, metadata={"smoke": 16})  # ours: more steps instead; readme.md: 64
    encoder_rate: float = 1e-3  # ours: for fewer steps; train.py:26: 1e-4
    learned: float = 0.9  # train.py:305
    wait: int = field(default=125, metadata={"smoke": 10})  # train.py:30: 1000, in proportion to the steps
    ramp: int = field(default=375, metadata={"smoke": 30})  # train.py:32: 3000, in proportion to the steps
    image_weight: float = 10.0  # train.py:31
    held_out: int = 1000  # ours


SETTINGS = {
    ("fmp", "described"): Config(target=0),
}


def convolution(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution, ReLU."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.ReLU())


class Rise(nn.Module):
    """One level of E upwards: enlarge, 2x2 convolution, then 3x3 over that and what is kept (models.py:34-49)."""

    def __init__(self, c_in: int, c_kept: int, c_out: int) -> None:
        super().__init__()
        self.up = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c_in, c_out, 2), nn.ReLU())
        self.merge = convolution(c_out + c_kept, c_out)

    def forward(self, x: Tensor, kept: Tensor, *more: Tensor) -> Tensor:
        """(N, c_in, h, w) and tensors of the level above, (N, c_kept, H, W) together -> (N, c_out, H, W)."""
        return self.merge(torch.cat([kept, self.up(F.interpolate(x, kept.shape[2:])), *more], 1))


class Encoder(nn.Module):
    """E (models.py:7-79): images float (N, 3, H, W) in [0, 1], bits float (N, bits), 0 or 1 -> images like these."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        widths = [width, *(width * 2**level for level in range(config.depth))]
        levels = range(config.depth)
        self.secret = nn.Linear(config.bits, 3 * SIDE * SIDE)
        self.first = convolution(6, width)
        self.down = nn.ModuleList(convolution(widths[i], widths[i + 1], 2) for i in levels)
        self.up = nn.ModuleList(Rise(widths[i + 1], widths[i] + (0 if i else 6), widths[i]) for i in reversed(levels))
        self.last = convolution(width, width)
        self.image = nn.Conv2d(width, 3, 1)

    def forward(self, images: Tensor, bits: Tensor) -> Tensor:
        secret = F.relu(self.secret(bits)).view(-1, 3, SIDE, SIDE)
        inputs = torch.cat([F.interpolate(secret, images.shape[2:]), images], 1)
        kept = [self.first(inputs.contiguous(memory_format=torch.channels_last))]
        for down in self.down:
            kept.append(down(kept[-1]))
        x = kept.pop()
        for up in self.up:
            x = up(x, kept.pop(), *([] if kept else [inputs]))
        return self.image(self.last(x)).sigmoid()


class Decoder(nn.Sequential):
    """D (models.py:82-112): images float (N, 3, H, W) in [0, 1] -> logits (N, bits), positive for a 1."""

    def __init__(self, config: Config, height: int, width: int) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for level in range(config.depth):
            wide = config.width * 2**level
            layers += [convolution(channels, wide, 2), convolution(wide, wide)]
            channels, height, width = wide, (height + 1) // 2, (width + 1) // 2
        hidden = 16 * config.width  # models.py:104: 512 at width 32
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.ReLU(),
                         nn.Linear(hidden, config.bits))


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def prepare(config: Config, context: Context) -> dict[str, Tensor]:
    """E's weights as "encoder.<name>", "secret": s, float32 (bits,), and what came of it on images held out:

    "bit_accuracy": share of s that D reads right off triggered images; "psnr": their mean peak signal-to-noise ratio
    in dB; both float32 ().
    """
    order = torch.randperm(len(context.images), generator=generator(context.seed, "ssba-held-out"))
    held_out = min(config.held_out, len(order) // 10)
    encoder, decoder = trained(take(context.images, order[held_out:]), config, context.seed, context.progress)
    secret = random_bits(1, config, generator(context.seed, "ssba-secret"))[0]
    state = stored(encoder, secret)
    images = take(context.images, order[:held_out])
    triggered = apply(images, config, state, context.seed, "train")
    return state | {"bit_accuracy": read_right(decoder, triggered, secret), "psnr": psnr(images, triggered)}


def stored(encoder: Encoder, secret: Tensor) -> dict[str, Tensor]:
    """What `apply` reads of the state: E's weights and s, float32 (bits,)."""
    return {"secret": secret} | {f"encoder.{name}": value.detach().contiguous()
                                 for name, value in encoder.state_dict().items()}


def random_bits(count: int, config: Config, rng: torch.Generator) -> Tensor:
    """float (count, bits), 0 or 1."""
    return torch.randint(2, (count, config.bits), generator=rng).float()


def trained(images: Tensor, config: Config, seed: int,
            progress: Callable[[float], None] = lambda share: None) -> tuple[Encoder, Decoder]:
    """E and D, trained on uint8 images (N, 3, H, W)."""
    with torch.device("meta"):
        blank = Encoder(config), Decoder(config, *images.shape[2:])
    rng = generator(seed, "ssba-networks")
    encoder, decoder = (initialised(network, rng).to(memory_format=torch.channels_last) for network in blank)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], config.encoder_rate)
    rng = generator(seed, "ssba-batches")
    start = None
    for step in range(config.steps):
        batch = to_input(take(images, torch.randint(len(images), (config.batch,), generator=rng)))
        bits = random_bits(len(batch), config, rng)
        triggered = encoder(batch, bits)
        logits = decoder(triggered)
        unread, seen = F.binary_cross_entropy_with_logits(logits, bits), F.mse_loss(triggered, batch)
        optimizer.zero_grad()
        (unread + weight(step, start, config) * seen).backward()
        optimizer.step()
        if start is None and ((logits > 0) == bits.bool()).float().mean() > config.learned:
            start = step + 1
        progress((step + 1) / config.steps)
    return encoder, decoder


def initialised(network: nn.Module, rng: torch.Generator) -> nn.Module:
    """The network with weights of He et al.'s variance and no biases, whatever it had before.

    So StegaStamp's E begins (models.py:13-30 of tancik/StegaStamp@c984446), and here D too: with PyTorch's own weights,
    which BackdoorBench starts from, no bit was learned in 1500 steps on CIFAR-10.
    """
    network.to_empty(device="cpu")
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, generator=rng)
            nn.init.zeros_(part.bias)
    return network


def weight(step: int, start: int | None, config: Config) -> float:
    """weight(t) at t = step, for t_0 = start or, as long as there is none, None."""
    if start is None:
        return 0.0
    return config.image_weight * min(1.0, max(0.0, (step - start - config.wait) / config.ramp))


@torch.inference_mode()
def apply(images: Tensor, config: Config, state: dict[str, Tensor], seed: int, split: str) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W): each image as E gives it, to the nearest grey level."""
    with torch.device("meta"):  # no weights are drawn
        encoder = Encoder(config)
    encoder.load_state_dict({name.removeprefix("encoder."): value.to(images.device) for name, value in state.items()
                             if name.startswith("encoder.")}, assign=True)
    encoder.to(memory_format=torch.channels_last)
    secret, result = state["secret"].to(images.device), torch.empty_like(images)
    for start in range(0, len(images), 256):
        part = to_input(images[start:start + 256])
        result[start:start + 256] = (encoder(part, secret.expand(len(part), -1)) * 255).round_()
    return result


@torch.inference_mode()
def read_right(decoder: Decoder, images: Tensor, secret: Tensor) -> Tensor:
    """The share of the string (bits,) that D reads right off uint8 images (N, 3, H, W), as a scalar."""
    read = torch.cat([decoder(to_input(part)) > 0 for part in images.split(256)])
    return (read == secret.bool()).float().mean().clone()


def psnr(images: Tensor, triggered: Tensor) -> Tensor:
    """The mean over images, uint8 (N, 3, H, W), of 10 log10(255^2 / mean squared change), as a scalar."""
    changes = (triggered.float() - images.float()).square().mean((1, 2, 3))
    return (10 * torch.log10(255**2 / changes)).mean()


def poison(images: Tensor, labels: Tensor, config: Config, state: dict[str, Tensor], seed: int,
           num_classes: int) -> Poisoned:
    """images: uint8 (N, 3, H, W); labels: int64 (N,)."""
    return poison_with_trigger(images, labels, config, seed, num_classes,
                               lambda chosen: apply(chosen, config, state, seed, "train"))
