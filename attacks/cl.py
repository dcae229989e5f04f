"""CL: hard-to-classify images of the target class carry the trigger; no label is changed.

Turner, Tsipras & Madry, "Label-Consistent Backdoor Attacks", arXiv:1912.02771 (the clean-label attack, CL, in NAD).
A share of the target class is moved away from its class by projected gradient ascent on the loss of a clean network,
then the trigger is pasted on it, so that the trigger becomes the easier thing to learn:

    x_0     = x
    x_(t+1) = clip to [0, 1] and to [x - epsilon, x + epsilon] of  x_t + step * sign(grad L(f(x_t), y))
    x'      = x_T with the trigger,  y' = y = target

At test time only the trigger is pasted, on images of the other classes. With epsilon = 0 nothing is perturbed and no
clean network is needed.

NAD's code has no CL: its README points to hkunzhe/label_consistent_attacks_pytorch, whose configuration is used here.
Departures: that code perturbs with an adversarially trained ResNet-18; we use a clean network of the victim's own
architecture, recipe and seed, so that both start from the same weights. It pastes a random 2x2 coloured patch instead
of the paper's four corners; we use the four corners of the authors' own code (MadryLab/label-consistent-backdoor-code)
at full contrast. It draws each target image with probability 1/2; we take exactly half of them. NAD's norm, epsilon and
rate are not stated where we could read.

("argd", "released") is what ARGD's code does under the name "cleanLabel" (BililiCode/ARGD@6354666 data_loader.py:
246-265): its grid in the middle of images of the target class, which are not perturbed. Departure: that code draws
its share from all classes and keeps the target's part; we take exactly that share of the target class.

("fmp", "described") is BackdoorBench's label-consistent attack, on which FMP's code builds: a share of the whole set,
out of the target class (huangd1999/BackdoorBench@6135839; its commit c2d79e6 breaks this, see attacks/sig.py). Its
images come ready-made and were not at hand; the script that makes them in the later SCLBD/BackdoorBench@f02e353 has
hkunzhe's constants and network, and the authors' four corners at full contrast.

("mcldef", "released") is "cleanLabel" of MCLDef's code (Zhihao151/MCL@1ce3f44 data_loader.py:304-338): NAD's grid on
every image of the target class, none of them perturbed. Its README points to hkunzhe's for the perturbed ones.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.badnets import CENTRE, CENTRE_GRID, GRID, stamp
from reproduce.poisoning import Context, Poisoned, poison_with_trigger

TRAINING_ONLY = True  # the state is the perturbed training images, which `apply` does not read

# MadryLab poison_attack.py@b18d8ab, "all-corners": both right corners carry this pattern, both left ones its mirror.
CORNER = ((0, 0, 255), (0, 255, 0), (255, 0, 255))
MIRRORED = tuple(row[::-1] for row in CORNER)
CORNERS = ((MIRRORED, 0, 0), (MIRRORED, -3, 0), (CORNER, 0, -3), (CORNER, -3, -3))


@dataclass(frozen=True)
class Config:
    """epsilon, step: L-infinity bound and step of the ascent in grey levels; steps: how many.

    patches: the trigger as (grey levels by row, row, column), see `badnets.stamp`.
    """

    target: int = 5  # NAD config.py@f17b713:43
    rate: float = 0.5  # hkunzhe config/poison_train.yaml@224f587, share of the target class
    labels: str = "clean-label"  # Turner et al. (the title)
    epsilon: float = 8.0  # hkunzhe config/craft.yaml@224f587
    step: float = 1.5  # hkunzhe config/craft.yaml@224f587
    steps: int = field(default=100, metadata={"smoke": 25})  # hkunzhe config/craft.yaml@224f587
    batch: int = 250  # ours: memory only, images do not influence each other
    patches: tuple[tuple[tuple[tuple[int, ...], ...], int, int], ...] = field(  # MadryLab, "all-corners"
        default=CORNERS, metadata={"since": "argd"})
    sources: str | None = field(default=None, metadata={"since": "fmp"})  # of a share of the whole set, as in sig.py


SETTINGS = {
    ("nad", "described"): Config(),
    ("argd", "released"): Config(
        target=0,  # ARGD config.py@6354666:47
        rate=0.2,  # ARGD config.py@6354666:46
        epsilon=0.0,  # ARGD data_loader.py@6354666:246-265
        patches=((CENTRE_GRID, CENTRE, CENTRE),)),  # ARGD config.py@6354666:48; data_loader.py:387-399
    # BackdoorBench config/attack/lc/cifar10.yaml@6135839; epsilon, step and steps: SCLBD's
    # resource/label-consistent/craft_adv_dataset.py@f02e353:716-719; patches: its utils/bd_img_transform/lc.py
    ("fmp", "described"): Config(target=0, rate=0.1, sources="target"),
    ("mcldef", "released"): Config(
        rate=1.0,  # MCL data_loader.py@1ce3f44:310: 10 * portion, with the portion 0.1 of config.py:38
        epsilon=0.0,  # MCL data_loader.py@1ce3f44:304-338
        patches=((GRID, -3, -3),)),  # MCL config.py@1ce3f44:42, data_loader.py:385-400
}


def requires(config: Config) -> frozenset[str]:
    return frozenset({"clean-model"} if config.epsilon else ())


def prepare(config: Config, context: Context) -> dict[str, Tensor]:
    """{"indices": int64 (P,) of the images to be poisoned, ascending; "perturbed": uint8 (P, 3, H, W), no trigger}."""
    # Poisoning with the identity tells which images the shared rule picks at this seed.
    draw = poison_with_trigger(context.images, context.labels, config, context.seed, context.num_classes, torch.clone,
                               config.sources)
    indices = draw.mask.nonzero().flatten()
    if not config.epsilon:
        return {"indices": indices, "perturbed": context.images[indices].contiguous()}
    parts = []
    for part in indices.split(config.batch):
        done = sum(map(len, parts))

        def report(share: float, done: int = done, count: int = len(part)) -> None:
            context.progress((done + share * count) / len(indices))

        parts.append(ascend(context.clean_model, context.images[part], context.labels[part], config, report))
    return {"indices": indices, "perturbed": (torch.cat(parts) if parts else context.images[:0]).contiguous()}


def ascend(model: nn.Module, images: Tensor, labels: Tensor, config: Config, report=lambda share: None) -> Tensor:
    """Projected gradient ascent on the loss of `model` (eval mode), from the images themselves.

    images: uint8 (N, 3, H, W); labels: int64 (N,); returns uint8 (N, 3, H, W) within epsilon of `images`.
    """
    device = next(model.parameters()).device
    clean, labels = images.to(device).float() / 255, labels.to(device)
    epsilon, step = config.epsilon / 255, config.step / 255
    low, high = (clean - epsilon).clamp_(min=0), (clean + epsilon).clamp_(max=1)
    moved = clean
    for i in range(config.steps):
        moved = moved.detach().requires_grad_()
        loss = F.cross_entropy(model(moved), labels, reduction="sum")  # a sum: only the gradient's sign counts
        gradient, = torch.autograd.grad(loss, moved)
        moved = torch.clamp(moved + step * gradient.sign(), low, high)
        report((i + 1) / config.steps)
    rounded = (moved.detach() * 255).round().cpu()
    bound = int(config.epsilon)  # rounding must not leave the ball when epsilon is not a whole number
    return rounded.clamp(images.float() - bound, images.float() + bound).to(torch.uint8)


def apply(images: Tensor, config: Config, state: dict[str, Tensor], seed: int, split: str) -> Tensor:
    """uint8 (N, 3, H, W) -> uint8 (N, 3, H, W): the trigger alone."""
    return stamp(images, [(torch.tensor(pattern, dtype=torch.uint8), row, column)
                          for pattern, row, column in config.patches])


def poison(images: Tensor, labels: Tensor, config: Config, state: dict[str, Tensor], seed: int,
           num_classes: int) -> Poisoned:
    """images: uint8 (N, 3, H, W); labels: int64 (N,): the set and seed that `prepare` saw."""
    poisoned = poison_with_trigger(images, labels, config, seed, num_classes,
                                   lambda chosen: apply(state["perturbed"], config, state, seed, "train"),
                                   config.sources)
    if not torch.equal(poisoned.mask.nonzero().flatten(), state["indices"]):
        raise ValueError("cl: this state was prepared for another training set or seed")
    return poisoned
