"""FMP: Adversarial Feature Map Pruning (Huang & Bu, ICLR 2024, arXiv:2307.11565).

The feature maps of a backdoor are those through which a small change of the image ruins clean predictions most. For
map k of convolution i, F_ik, over clean images x with labels y:

    x0   = clip(x + alpha r),   r = -1 or 1 at random for every value          clip: to [0, 1]
    x_ik = clip(x0 + eps sign(gradient at x0 of MSE(F_ik(x), F_ik(x0))))       feature reverse generation, one step
    a_ik = accuracy of the whole, unpruned model on (x_ik, y)                  the score of the map
    prune, of each convolution with C maps, the floor(C / p) with the lowest a_ik;   then minimise CE(x, y)

Without the noise r nothing would happen: at x0 = x the MSE is at its minimum and its gradient is exactly 0.

To prune a map is to set its filter to 0, and the scale of the BatchNorm registered after the convolution (fg:269-283).
In a pre-activation network that is the map's own BatchNorm for the first convolution of a block and for the stem. For
the last one it is the next block's, or the final one: it normalises the residual sum, so that a channel of all that was
summed is cut off from the next convolution, though not from the identity shortcut past it. A convolution with another
one registered next loses the filter alone. The shift stays: a pruned channel is a constant. No mask is kept. Where
a map goes nowhere but into its own BatchNorm the gradients of filter and scale are 0 when both are 0, and without
weight decay it stays pruned; maps that also pass by it, into a shortcut, may grow back.

Two settings. The paper's text was not readable to us, and what others quote of it does not say most of what follows.
The released main script (fg: defense/fgsm-feature.py of retsuh-bqw/FMP@8d1cb59; ym: its constants, in
config/defense/feature/cifar10.yaml of ASE2023Paper/FMT@781a54f) departs from the method above in seven points. They are
FAULTS; `described` is the script without them, `released` has them all, and `with_fault` and `without_fault` make the
settings between the two, so that a table can show what each is worth:

    noise           alpha 0.02 and eps 0.06 (ym), 5 and 15 grey levels. The independent port to BackdoorBench
                    (WhoDunnett/BackdoorBenchmark@8613640 defense/fmp.py) uses one number in both roles, 1/255, which
                    we take for `described`.
    batch           32 of the clean images make all scores (fg:143,158-163), so that a_ik is a multiple of 1/32 and ties
                    decide. `described` uses them all.
    normalised      the images are normalised, and so is the network's input (fg:143-144): scores come from images
                    normalised twice, clipped to [0, 1] where black to white is about -2 to 2. Of no effect on models
                    that normalise nothing.
    rotated         scores are collected as the convolutions run and used as they are registered (fg:164-188, 269-281):
                    a block of its PreAct-ResNet18 runs its shortcut first and registers it last, so that the three
                    convolutions of such a block are pruned by one another's scores.
    summed          the shortcut is added in place to the tensor that was kept as the map of a block's last convolution
                    (models/preact_resnet.py:41): the map that is attacked is one of the block's output.
                    This and `rotated` are of no effect on networks that run in the order they are registered and add
                    out of place, such as NAD's WideResNet.
    augmented       those images are randomly cropped and flipped (fg:389,402).
    leak            after each epoch the test images run through the network in train mode (fg:315-324), so that the
                    statistics of its BatchNorms end up as those of the test set. NO OTHER DEFENSE AND NO OTHER SETTING
                    MAY SEE TEST DATA: this one asks for them ("test-images") to measure what that fault is worth.

Controls: the same number of maps drawn at random; those least active on clean images, Fine-Pruning's rule; none at all,
which leaves the fine-tuning. "zero-beta" also sets the shift of the BatchNorm to 0, as the port does.

Departures. Ties go to the lower index; numpy's argsort, not a stable one, leaves them to the machine (fg:60).
A convolution's bias is pruned with its filter. The clean subset is drawn uniformly, not by class. Convolutions of fewer
than p maps, of which nothing is pruned, are not scored. alpha is 0.03 in FMT's configurations of CIFAR-100 and GTSRB.
The variant called pgd (defense/pgd-feature.py) is not here: it takes two accuracies per map for those of two maps and
indexes past the last filter.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses import ft
from reproduce.data.augment import Augment, apply, draw, take, to_input
from reproduce.defending import Clean, Defended
from reproduce.errors import UserError
from reproduce.models.taps import features
from reproduce.rng import generator
from reproduce.training import Cosine, Observer, Recipe, silent

RECIPE = Recipe(
    epochs=10, batch=256,                       # ym
    rates=((0, 0.01),),                         # fg:301, which ignores the configuration's
    cosine=Cosine(10, 1e-4),                    # fg:302
    momentum=0.9, nesterov=False, weight_decay=0.0,             # fg:301
    augment=Augment(crop=4, flip=True),         # BackdoorBench's get_transform for CIFAR-10; fg:389
)


@dataclass(frozen=True)
class Config:
    """images: how many of the clean images score, None for all. select: which maps of a convolution go: those of the
    lowest score, random ones, the least active ones, or none. batch: of the forward passes that score, None for what
    suits the device. The rest is explained above."""

    eps: float = 1 / 255
    alpha: float = 1 / 255
    images: int | None = field(default=None, metadata={"smoke": 3, "short": 256})
    p: int = 64                                 # fg:60
    select: Literal["lowest", "random", "activation", "none"] = "lowest"
    keep_beta: bool = True                      # fg:276,282
    double_normalisation: bool = False
    rotated: bool = False
    summed: bool = False
    augmented: bool = False
    leak: bool = False
    batch: int | None = field(default=None, metadata={"identity": False})
    recipe: Recipe = RECIPE

    def __post_init__(self) -> None:
        if self.eps <= 0 or self.alpha <= 0:
            raise UserError("FMP needs a step and start noise above 0 (without noise there is no gradient), not "
                            f"eps={self.eps}, alpha={self.alpha}")
        if self.p < 1 or (self.images is not None and self.images < 1) or (self.batch is not None and self.batch < 1):
            raise UserError(f"FMP's p, images and batch are at least 1, not p={self.p}, images={self.images}, "
                            f"batch={self.batch}")
        if self.select not in ("lowest", "random", "activation", "none"):
            raise UserError(f"FMP's select is one of lowest, random, activation, none, not {self.select!r}")


# What the released script does otherwise, for CIFAR-10.
FAULTS: dict[str, dict[str, Any]] = {
    "noise": {"eps": 0.06, "alpha": 0.02},
    "batch": {"images": 32},
    "normalised": {"double_normalisation": True},
    "rotated": {"rotated": True},
    "summed": {"summed": True},
    "augmented": {"augmented": True},
    "leak": {"leak": True},
}
DESCRIBED = Config()
RELEASED = replace(DESCRIBED, **{name: value for fault in FAULTS.values() for name, value in fault.items()})


def with_fault(name: str) -> Config:
    """The described method with one of FAULTS."""
    return replace(DESCRIBED, **FAULTS[name])


def without_fault(name: str) -> Config:
    """The released script with one of FAULTS mended."""
    return replace(RELEASED, **{field: getattr(DESCRIBED, field) for field in FAULTS[name]})


SETTINGS = {
    ("fmp", "described"): DESCRIBED,
    ("fmp", "released"): RELEASED,
    ("fmp", "random"): replace(DESCRIBED, select="random"),
    ("fmp", "activation"): replace(DESCRIBED, select="activation"),
    ("fmp", "no-pruning"): replace(DESCRIBED, select="none"),
    ("fmp", "zero-beta"): replace(DESCRIBED, keep_beta=False),
    **{("fmp", f"described with {name}"): with_fault(name) for name in FAULTS},
    **{("fmp", f"released without {name}"): without_fault(name) for name in FAULTS},
}


def requires(config: Config) -> frozenset[str]:
    """Nothing but the clean images, and for the leak the test images."""
    return frozenset({"test-images"} if config.leak else ())


def work(config: Config, images: int, classes: int) -> float:
    """A map costs each scoring image one pass forwards and at most one backwards; as many maps as WRN-16-1 scores."""
    return 320 * min(images, config.images or images) / 2 if config.select == "lowest" else 0


def defend(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent,
           clean_model: nn.Module | None = None) -> Defended:
    """A copy of `model` with the selected maps pruned, fine-tuned on the clean images.

    info: the layers that maps are pruned from, the pruned maps of each, and how many of how many; where maps are
    scored, the range of the scores and the accuracy (percent) on the scoring images undisturbed, as they are scored.
    tensors, of M maps: layer int64 (M,), a number in info["layers"]; pruned bool (M,); where maps are ranked, scores
    float32 (M,), accuracies in percent or activities, each beside the map it was measured on.
    """
    if config.leak and clean.test is None:
        raise UserError("this setting of FMP reproduces a leak of test images and was granted none: choose one without")
    victim = deepcopy(model).eval().requires_grad_(False)
    sizes = {name: conv.out_channels for name, conv in convolutions(victim).items() if conv.out_channels >= config.p}
    if not sizes:
        raise UserError(f"FMP prunes one map in {config.p} of a convolution and this {type(model).__name__} has none "
                        "with as many: choose a smaller p")
    info: dict[str, Any] = {"layers": list(sizes), "maps": sum(sizes.values())}
    images, labels = scoring_images(clean, config, seed)
    scores: dict[str, Tensor] = {}
    if config.select == "lowest":
        signs = start_signs(images, seed)
        scores, undisturbed = accuracies(victim, images, labels, signs, list(sizes), config, observe)
        flat = torch.cat(list(scores.values()))
        info |= {"scoring_acc": undisturbed, "score_range": [flat.min().item(), flat.max().item()]}
    elif config.select == "activation":
        scores = activities(victim, images, list(sizes))
    used = scores
    if config.rotated and scores:
        source = rotation(victim, to_input(images[:1]))
        used = {name: scores[source[name]] for name in sizes}
    chosen = selected(sizes, used, config, seed)
    repaired = deepcopy(model)
    prune(repaired, chosen, config.keep_beta)
    if config.leak:
        observe = absorbing(clean.test, config.recipe.batch, seed, observe)
    repaired = ft.fine_tune(repaired, clean, config.recipe, seed, phase="pruned", observe=observe)
    info |= {"pruned_maps": sum(map(len, chosen.values())),
             "pruned": {name: sorted(maps) for name, maps in chosen.items() if maps}}
    return Defended(repaired, info, {
        "layer": torch.cat([torch.full((size,), i) for i, size in enumerate(sizes.values())]),
        "pruned": torch.tensor([k in chosen[name] for name, size in sizes.items() for k in range(size)]),
        **({"scores": torch.cat(list(scores.values()))} if scores else {})})


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Every convolution by name, in the order of registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def norms_after(model: nn.Module) -> dict[str, list[str]]:
    """For each convolution the BatchNorms of as many channels registered between it and the next one."""
    found: dict[str, list[str]] = {}
    channels = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found[name], channels = [], module.out_channels
        elif isinstance(module, nn.BatchNorm2d) and module.num_features == channels:
            found[next(reversed(found))].append(name)
    return found


# Scores


def scoring_images(clean: Clean, config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """The images that make the scores, uint8 (n, 3, H, W), and their labels."""
    images, labels = clean.images, clean.labels
    if config.images is not None and config.images < len(images):
        index = torch.randperm(len(images), generator=generator(seed, "fmp images"))[:config.images].to(images.device)
        images, labels = take(images, index), labels[index]
    if config.augmented:
        parameters = draw(len(images), images.shape[-1], config.recipe.augment, generator(seed, "fmp augmentation"))
        images = apply(images, parameters.to(images.device), config.recipe.augment)
    return images, labels


def start_signs(images: Tensor, seed: int) -> Tensor:
    """The signs of the start noise: int8 of the images' shape, on their device."""
    signs = torch.randint(2, images.shape, generator=generator(seed, "fmp noise"), dtype=torch.int8) * 2 - 1
    return signs.to(images.device)


def accuracies(model: nn.Module, images: Tensor, labels: Tensor, signs: Tensor, names: list[str], config: Config,
               observe: Observer = silent) -> tuple[dict[str, Tensor], float]:
    """The score of every map of the named convolutions, float32 (C,) in percent, and that of the images as they are.

    model: frozen, in eval mode, where images do not influence one another. So maps share the passes that need not
    know them: both that make the feature maps run once for all, and the gradient of a map starts at its layer.
    """
    rows = config.batch or (256 if images.device.type == "cpu" else 512)
    normalise = getattr(model, "normalise", nn.Identity()) if config.double_normalisation else nn.Identity()
    summed = config.summed and getattr(model, "adds_in_place", False)
    sums = run_order(model, to_input(images[:1]))[1] if summed else {}
    taps = [sums.get(name, name) for name in names]
    right = {name: torch.zeros(model.get_submodule(name).out_channels, dtype=torch.int64, device=images.device)
             for name in names}
    undisturbed, seen = 0, 0
    parts = torch.arange(len(images)).split(rows)
    for number, part in enumerate(parts):
        batch, truth = slice(int(part[0]), int(part[-1]) + 1), labels[part]
        inputs = normalise(to_input(images[batch]))
        start = (inputs + config.alpha * signs[batch]).clamp(0, 1).requires_grad_()
        with torch.no_grad():
            logits, clean_maps = features(model, inputs, taps)
        _, start_maps = features(model, start, taps)
        undisturbed += int((logits.argmax(1) == truth).sum())
        seen += len(truth)
        for name, before, after in zip(names, clean_maps, start_maps, strict=True):
            for maps in torch.arange(before.shape[1]).split(max(1, rows // len(truth))):
                stepped = torch.cat([step_up(start, before, after, int(k), config.eps) for k in maps])
                with torch.no_grad():
                    labelled = model(stepped).argmax(1).view(len(maps), -1)
                right[name][maps] += (labelled == truth).sum(1)
        wrong = 1 - float(torch.cat(list(right.values())).double().mean()) / seen
        observe("scoring", number + 1, len(parts), model, {"epoch": number + 1, "loss": wrong})
    return {name: (100 * count / seen).float().cpu() for name, count in right.items()}, 100 * undisturbed / seen


def step_up(start: Tensor, before: Tensor, after: Tensor, k: int, eps: float) -> Tensor:
    """x_ik, (n, 3, H, W), from x0 = `start`. before, after: feature maps (n, C, h, w) of x and of x0, these with a
    graph back to x0."""
    # Of sum / 2 instead of the mean, which is a positive factor and leaves the signs.
    slope = torch.zeros_like(after)
    slope[:, k] = (after.detach() - before)[:, k]
    gradient, = torch.autograd.grad(after, start, slope, retain_graph=True)
    return (start.detach() + eps * gradient.sign()).clamp(0, 1)


def run_order(model: nn.Module, inputs: Tensor) -> tuple[list[str], dict[str, str]]:
    """The convolutions in the order they run, and for each whose sum with a shortcut is its block's output the block.

    That is a block whose last layer with weights is the convolution and that returns something else than it does.
    """
    order: list[str] = []
    sums: dict[str, str] = {}
    last: list[tuple[str, Tensor]] = []

    def heard(name: str, module: nn.Module, output: Tensor) -> None:
        if next(module.parameters(recurse=False), None) is not None:
            last[:] = [(name, output)]
            if isinstance(module, nn.Conv2d):
                order.append(name)
        elif last and last[0][0] == order[-1] and order[-1].rpartition(".")[0] == name and output is not last[0][1]:
            sums[order[-1]] = name

    handles = [module.register_forward_hook(lambda module, _inputs, output, name=name: heard(name, module, output))
               for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return order, sums


@torch.no_grad()
def activities(model: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Mean over images and pixels of each map after its BatchNorm, if it has one, and ReLU: float32 (C,)."""
    norms = norms_after(model)
    taps = [(norms[name] or [name])[0] for name in names]
    sums = [torch.zeros(()) for _ in taps]
    for part in images.split(256):
        maps = features(model, to_input(part), taps)[1]
        sums = [total.to(found) + F.relu(found).mean((2, 3)).sum(0) for total, found in zip(sums, maps, strict=True)]
    return {name: (total / len(images)).cpu() for name, total in zip(names, sums, strict=True)}


# Pruning


def selected(sizes: dict[str, int], scores: dict[str, Tensor], config: Config, seed: int) -> dict[str, list[int]]:
    """The maps to prune of each convolution. sizes: how many it has; scores: by convolution, where maps are ranked."""
    chosen = {}
    for name, size in sizes.items():
        if config.select == "random":
            order = torch.randperm(size, generator=generator(seed, "fmp random", name))
        else:
            order = scores[name].sort(stable=True).indices if scores else torch.arange(0)
        chosen[name] = order[:size // config.p].tolist()
    return chosen


def rotation(model: nn.Module, inputs: Tensor) -> dict[str, str]:
    """For each convolution the one whose scores the released script prunes it by."""
    registered, order = convolutions(model), run_order(model, inputs)[0]
    source = dict(zip(registered, order, strict=True))
    if any(registered[name].out_channels != registered[other].out_channels for name, other in source.items()):
        raise UserError(f"the convolutions of this {type(model).__name__} have other widths in the order they run than "
                        "in the order they are registered: FMP's rotated scores do not fit it")
    return source


@torch.no_grad()
def prune(model: nn.Module, chosen: dict[str, list[int]], keep_beta: bool) -> None:
    """Zero the filters of the chosen maps, and the scales of the BatchNorms after them, in place."""
    norms = norms_after(model)
    for name, maps in chosen.items():
        conv = model.get_submodule(name)
        zeroed = [conv.weight, conv.bias]
        for norm in map(model.get_submodule, norms[name]):
            zeroed += [norm.weight] if keep_beta else [norm.weight, norm.bias]
        for parameter in zeroed:
            if parameter is not None:
                parameter[maps] = 0


def absorbing(test: Tensor, batch: int, seed: int, observe: Observer) -> Observer:
    """`observe`, after the BatchNorms of the model it is told of have taken in the test images, uint8 (N, 3, H, W)."""
    def hear(phase: str, epoch: int, epochs: int, model: nn.Module, row: dict[str, float]) -> None:
        model.train()
        order = torch.randperm(len(test), generator=generator(seed, "order", "fmp leak", epoch))
        with torch.no_grad():
            for index in order.split(batch):
                model(to_input(take(test, index.to(test.device))))
        observe(phase, epoch, epochs, model.eval(), row)

    return hear
