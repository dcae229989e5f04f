"""MCLDef: model-contrastive learning for backdoor elimination (Yue et al., ACM MM 2023, arXiv:2205.04411).

Stage 1 inverts the trigger from clean images; stage 2 pulls the features of stamped images to where a frozen copy g of
the victim sees their clean twins, and away from where g sees the stamped images themselves.

    "pixel" (2023):  x~ = clip(x + delta),  delta = clip(P+) - clip(P-)          clip to [0, 1]; P+, P-: (3, H, W)
                     minimise CE(f(x~), target) + c R,  R = sum over pixels, P+ and P- of max_channel tanh(P/10)/2 + 1/2
    "mask" (2022):   x~ = (1 - m) x + m t;  minimise CE(f(x~), target) + lambda ||m||_1
    stage 2:         minimise -log( e^{cos(z, z+)/T} / (e^{cos(z, z+)/T} + e^{cos(z, z-)/T}) )
                     z = feature of x~ in f,  z+ = of x in g,  z- = of x~ in g;  feature: the input of the classifier

Constants: Zhihao151/MCL@1ce3f44, the code the ACM paper names; those marked 2022 are of WeCanShow/MCL@7bd932a, which
the arXiv version names. The two invert and stamp differently, and which of them made the paper's tables is not known.

What the released code does, and `released` keeps: the loss does not see the classifier, which stays the victim's bit
for bit; BatchNorm takes its statistics from stamped images only; where no trigger reaches 90 % success, delta = 0,
and nothing is learnt. It is told the target label. ("mcldef", "described") finds it out with Neural Cleanse, measures
the statistics anew on clean images, and instead of delta = 0 takes the most successful trigger; the abstract, all we
could read of the paper, says of this no more than that a trigger is synthesised and the model learns contrastively.
Neural Cleanse rather than "pixel" for each label: its outlier rule is published, while "pixel" gives the same empty
trigger, the smallest of all, to every label it cannot reach.

Controls: inversion="random" puts the pixels of the trigger that "pixel" finds in random places with random signs;
loss="cross-entropy" fine-tunes on the stamped images with their own labels, everything else unchanged.

Departures. Images are in [0, 1] without normalisation, in the models too; 2022 keeps its pattern in [0, 1] among
normalised images. The last images of a stage-2 epoch, too few for a batch, are used. P starts from a seed.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses import nc
from defenses.mcr import measure_batch_norm
from reproduce.data.augment import Augment, to_input
from reproduce.defending import Clean, Defended
from reproduce.errors import UserError
from reproduce.models.taps import penultimate
from reproduce.rng import generator
from reproduce.training import Loss, LossFunction, Observer, Recipe, cross_entropy, silent, train

Passes = Callable[[int], Iterable[Tensor]]      # step -> the float batches (n, 3, H, W) in [0, 1] of one pass

VISIBLE = 1 / 255       # inversion_torch.py:151: smaller changes are no changes


@dataclass(frozen=True)
class Pixel:
    """The inversion of 2023. A step is one pass over the clean images."""

    steps: int = field(default=100, metadata={"smoke": 6})      # main.py:42
    rate: float = 0.1                           # inversion_torch.py:18
    betas: tuple[float, float] = (0.5, 0.9)     # :87
    success: float = 0.9                        # :16
    cost: float = 1e-3                          # :17
    factor: float = 1.5                         # :49
    patience: int = 10                          # :48


@dataclass(frozen=True)
class Mask:
    """The inversion of 2022."""

    steps: int = field(default=100, metadata={"smoke": 10})     # 2022 main.py:252
    rate: float = 0.005         # :34
    cost: float = 0.01          # :238, lambda of CIFAR-10
    patience: int = 30          # :65, steps without a smaller mask


RECIPE = Recipe(
    epochs=20,                                  # config.py:14
    rates=((0, 0.1), (1, 0.01), (10, 1e-3)),    # utils/util.py:77-85
    batch=64,                                   # config.py:15
    momentum=0.9, nesterov=False,               # main.py:229-232
    weight_decay=1e-4,                          # config.py:18
    augment=Augment(),                          # data_loader.py:20-27
)


@dataclass(frozen=True)
class Config:
    """target: the label the defense is told, or None to find it with `estimate`. Stage 1 uses recipe.batch and
    recipe.augment too.

    fallback: the most successful trigger rather than none, where none reaches `pixel.success`.
    statistics: of the repaired model's BatchNorms, as training on stamped images left them or measured on clean ones.
    """

    inversion: Literal["pixel", "mask", "random"] = "pixel"
    target: int | None = 5                      # config.py:39
    loss: Literal["contrastive", "cross-entropy"] = "contrastive"
    temperature: float = 0.5                    # config.py:46
    fallback: bool = False
    statistics: Literal["stamped", "clean"] = "stamped"
    pixel: Pixel = Pixel()
    mask: Mask = Mask()
    estimate: nc.Inversion = nc.INVERSION
    recipe: Recipe = RECIPE

    def __post_init__(self) -> None:
        for name, known in (("inversion", ("pixel", "mask", "random")), ("loss", ("contrastive", "cross-entropy")),
                            ("statistics", ("stamped", "clean"))):
            if getattr(self, name) not in known:
                raise UserError(f"MCLDef's {name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.temperature <= 0:
            raise UserError(f"MCLDef's temperature is above 0, not {self.temperature}")
        if min(self.pixel.steps, self.mask.steps) < 1:
            raise UserError("MCLDef inverts in at least one step")


RELEASED = Config()
SETTINGS = {
    ("mcldef", "released"): RELEASED,
    ("mcldef", "released-2022"): replace(
        RELEASED, inversion="mask",
        recipe=replace(RECIPE, augment=Augment(crop=4, flip=True)),     # 2022 data_loader.py:20-21
    ),
    ("mcldef", "described"): replace(RELEASED, target=None, fallback=True, statistics="clean"),
    ("mcldef", "estimated"): replace(RELEASED, target=None),
    ("mcldef", "random-trigger"): replace(RELEASED, inversion="random"),
    ("mcldef", "cross-entropy"): replace(RELEASED, loss="cross-entropy"),
}


def requires(config: Config) -> frozenset[str]:
    """Nothing but the clean images."""
    return frozenset()


def builds_on(config: Config) -> tuple[str, nc.Config | Config] | None:
    """Where the target is to be found: Neural Cleanse, whose masks of all classes tell it. Where it is told: the plain
    settings of this inversion, whose trigger the controls and every temperature share."""
    if config.target is None:
        return "nc", nc.Config(inversion=config.estimate)
    plain = replace(config, inversion="pixel" if config.inversion == "random" else config.inversion,
                    loss="contrastive", temperature=Config.temperature, statistics="stamped")
    return None if config == plain or config.fallback else ("mcldef", plain)


def work(config: Config, images: int, classes: int) -> float:
    """Stage 1, unless it is another run's."""
    if (base := builds_on(config)) and base[0] == "mcldef":
        return 0
    return (config.mask if config.inversion == "mask" else config.pixel).steps * images


def defend(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent,
           clean_model: nn.Module | None = None, base: dict[str, Tensor] | None = None) -> Defended:
    """A copy of `model` purified with an inverted trigger. base: the tensors of the run that `builds_on` names, whose
    masks or trigger are not searched for again.

    info: target and who named it; the trigger's L1 norm and number of changed pixels; whether stage 1 reached the
    success it asks for; the trigger's success (percent) on clean images of other classes; where the target was
    estimated, what `nc.Estimate` says. tensors: `Trigger.tensors`.
    """
    victim = nc.frozen(model)
    if config.target is None:
        masks = base["masks"] if base else nc.invert_classes(
            model, clean, range(clean.num_classes), config.estimate, seed,
            lambda _phase, *row: observe("target", *row)).masks
        info = nc.estimate_target(masks).describe()
    else:
        nc.check_target(config.target, clean)
        info = {"target": config.target, "target_from": "granted"}
    if base and config.target is not None:
        found = Trigger(*(base[name].to(clean.images.device) for name in ("trigger", "mask") if name in base))
        reached = found.mask is not None or bool(found.pattern.any())
    else:
        found, reached = find_trigger(victim, clean, info["target"], config, seed, observe)
    trigger = scattered(found, seed) if config.inversion == "random" else found
    stamped = (255 * trigger(to_input(clean.images))).round().to(torch.uint8)
    info |= {"reached": reached, "l1": trigger.l1(), "changed_pixels": trigger.changed(),
             "success": nc.success_rate(victim, stamped, clean.labels, info["target"])}
    repaired = deepcopy(model).requires_grad_(True)
    train(repaired, clean.images, clean.labels, config.recipe, seed, phase="purification",
          loss=purification(victim, trigger, config), observe=observe)
    if config.statistics == "clean":
        measure_batch_norm(repaired, clean.images)
    return Defended(repaired.eval(), info, trigger.tensors())


# Stage 1


@dataclass(frozen=True)
class Trigger:
    """What is stamped: x + pattern, or with a mask (1 - mask) x + mask * pattern, clipped to [0, 1].

    pattern: (3, H, W), a signed difference if there is no mask; mask: (H, W).
    """

    pattern: Tensor
    mask: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Float images (N, 3, H, W) in [0, 1] -> the same, stamped."""
        if self.mask is None:
            return (images + self.pattern).clamp(0, 1)
        return torch.lerp(images, self.pattern, self.mask)

    def l1(self) -> float:
        """L1 norm of the difference, or of the mask."""
        return (self.pattern if self.mask is None else self.mask).abs().sum().item()

    def changed(self) -> int:
        """Pixels that are not 0 in the difference, or not below 1/255 in the mask."""
        return int((self.pattern.any(0) if self.mask is None else self.mask >= VISIBLE).sum())

    def tensors(self) -> dict[str, Tensor]:
        """For figures: trigger (3, H, W) and, if there is one, mask (H, W)."""
        return {"trigger": self.pattern, **({} if self.mask is None else {"mask": self.mask})}


def find_trigger(victim: nn.Module, clean: Clean, target: int, config: Config, seed: int,
                 observe: Observer = silent) -> tuple[Trigger, bool]:
    """Stage 1 with the inversion of `config` ("random" finds what "pixel" does): the trigger, and whether it is one the
    inversion calls successful."""
    masked, batch, augment = config.inversion == "mask", config.recipe.batch, config.recipe.augment

    def passes(step: int) -> Iterable[Tensor]:
        return nc.one_pass(clean.images, batch, generator(seed, "order", "inversion", step), augment,
                           drop_last=not masked)     # data_loader.py:73; 2022 :60

    start = torch.rand((2, *clean.images.shape[1:]), generator=generator(seed, "trigger")).to(clean.images.device)
    if masked:
        return invert_mask(victim, passes, target, start[0], start[1, 0], config.mask, observe), True
    return invert_pixels(victim, passes, target, start, config.pixel, config.fallback, observe)


def invert_pixels(model: nn.Module, passes: Passes, target: int, start: Tensor, settings: Pixel,
                  fallback: bool = False, observe: Observer = silent) -> tuple[Trigger, bool]:
    """The inversion of 2023 from P+ and P-, start: (2, 3, H, W); model: frozen, in eval mode.

    Among the triggers of success >= settings.success the last that had both a smaller R and fewer pixels than those
    kept before; without any, the zero trigger, or with `fallback` the one of the highest success. And: whether any.
    """
    signed = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([signed], settings.rate, settings.betas)
    schedule = nc.Schedule(settings.cost, settings.factor, settings.patience, settings.cost)
    kept = near = torch.zeros_like(start[0])
    best_penalty = best_pixels = float("inf")
    highest = 0.0
    for step in range(settings.steps):
        rows = []
        for images in passes(step):
            parts = signed.clamp(0, 1)
            logits = model((images + (parts[0] - parts[1])).clamp(0, 1))
            entropy, penalty = F.cross_entropy(logits, _wanted(target, images)), size_penalty(signed)
            optimizer.zero_grad()
            (entropy + schedule.cost * penalty).backward()
            optimizer.step()
            rows.append(torch.stack([entropy, penalty, (logits.argmax(1) == target).float().mean()]).detach())
        entropy, penalty, success = torch.stack(rows).double().mean(0).tolist()
        # The parts as last stamped, before the last update: inversion_torch.py:151-160.
        parts = parts.detach()
        parts = torch.where(parts < VISIBLE, 0.0, parts)
        difference = parts[0] - parts[1]
        pixels = int(difference.any(0).sum())
        if step % nc.REPORT == 0:
            observe("inversion", step + 1, settings.steps, model, {
                "epoch": step + 1, "loss": entropy + schedule.cost * penalty, "ce": entropy, "penalty": penalty,
                "success": success, "cost": schedule.cost, "pixels": pixels})
        if success >= settings.success and penalty < best_penalty and pixels < best_pixels:
            best_penalty, best_pixels, kept = penalty, pixels, difference
            with torch.no_grad():
                signed.copy_(parts)
        if success > highest:
            highest, near = success, difference
        schedule.update(success >= settings.success)
    reached = best_pixels < float("inf")
    return Trigger(near if fallback and not reached else kept), reached


def size_penalty(signed: Tensor) -> Tensor:
    """R as a scalar; signed: (2, 3, H, W), P+ and P-."""
    return ((signed / 10).tanh() / 2 + 0.5).max(1).values.sum()     # inversion_torch.py:126-130


def invert_mask(model: nn.Module, passes: Passes, target: int, pattern: Tensor, mask: Tensor, settings: Mask,
                observe: Observer = silent) -> Trigger:
    """The inversion of 2022: the last trigger, not the best. pattern: (3, H, W) and mask: (H, W), where to start."""
    pattern, mask = pattern.clone().requires_grad_(), mask.clone().requires_grad_()
    optimizer = torch.optim.Adam([pattern, mask], settings.rate)
    smallest, stalled = float("inf"), 0
    for step in range(settings.steps):
        rows = []
        for images in passes(step):
            logits = model(torch.lerp(images, pattern, mask))
            entropy, norm = F.cross_entropy(logits, _wanted(target, images)), mask.abs().sum()
            optimizer.zero_grad()
            (entropy + settings.cost * norm).backward()
            optimizer.step()
            with torch.no_grad():
                pattern.clamp_(0, 1)
                mask.clamp_(0, 1)
            rows.append(torch.stack([entropy, norm, (logits.argmax(1) == target).float().mean()]).detach())
        if step % nc.REPORT == 0:
            entropy, norm, success = torch.stack(rows).mean(0).tolist()
            observe("inversion", step + 1, settings.steps, model, {
                "epoch": step + 1, "loss": entropy + settings.cost * norm, "ce": entropy, "norm": norm,
                "success": success})
        size = mask.sum().item()
        smallest, stalled = (size, 0) if size < smallest else (smallest, stalled + 1)
        if stalled > settings.patience:
            break
    return Trigger(pattern.detach(), mask.detach())


def _wanted(target: int, images: Tensor) -> Tensor:
    return torch.full((len(images),), target, device=images.device)


def scattered(trigger: Trigger, seed: int) -> Trigger:
    """The same changed pixels in other places, their channels shuffled, each value with a random sign."""
    rng, device = generator(seed, "scattered"), trigger.pattern.device
    pattern = trigger.pattern.cpu()
    channels, height, width = pattern.shape
    values = pattern.flatten(1)[:, torch.randperm(height * width, generator=rng)].abs()
    values = values.gather(0, torch.rand(values.shape, generator=rng).argsort(0))
    signs = torch.randint(2, values.shape, generator=rng) * 2 - 1
    return Trigger((values * signs).view(channels, height, width).to(device))


# Stage 2


def purification(victim: nn.Module, trigger: Trigger, config: Config) -> LossFunction:
    """The loss of stage 2 for `train`; its logits, and so its training accuracy, are those on stamped images."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        stamped = trigger(images)
        if config.loss == "cross-entropy":
            return cross_entropy(model, stamped, labels)
        logits, anchor = penultimate(model, stamped)
        with torch.no_grad():
            positive, negative = (penultimate(victim, batch)[1] for batch in (images, stamped))
        return Loss(contrastive_loss(anchor, positive, negative, config.temperature), logits)

    return loss


def contrastive_loss(anchor: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """Mean of -log softmax of the positive among the two, as a scalar; all three are (N, D)."""
    near, far = (F.cosine_similarity(anchor.float(), other.float(), dim=-1) for other in (positive, negative))
    return F.softplus((far - near) / temperature).mean()
