"""NC: Neural Cleanse (Wang et al., IEEE S&P 2019).

A backdoor makes one class reachable from all images by a small change. So (1) for every class k find the smallest
trigger that sends images there, (2) call the class whose trigger is an outlier the target, (3) unlearn its trigger.

    x~ = (1 - m) x + m t                         mask m: (H, W), pattern t: (3, H, W), both tanh(theta) / 2 + 1/2
    minimise over m, t:  CE(f(x~), k) + c ||m||_1           c follows the success of the trigger: see `Schedule`
    index = (median - min_k n_k) / (1.4826 median |n - median|)     of the norms n_k = ||m_k||_1; above 2: a backdoor
    minimise over the weights:  CE(f(x'), y)     x' = x~ for a share of the clean images, with their own labels y

Constants: bolunwang/backdoor@e857774 (inversion and outliers), "bench" for SCLBD/BackdoorBench@f02e353 (defense/nc.py
and config/defense/nc/config.yaml). The authors published no code for unlearning; their paper was not readable to us.

Which labels are unlearnt. Neural Cleanse leaves a model without an outlier alone. In a comparison of repairs every
victim is known to be backdoored, so we then unlearn the label of the smallest mask; `only_flagged` restores the rule,
and `info` always has the index. Several flagged labels share the stamped images evenly (bench: a copy for each).

("fmp", "described") is the row of BackdoorBench v1 (huangd1999/BackdoorBench@6135839, the fork of FMP's authors: v1,
defense/nc/nc.py, yaml: config/defense/nc/cifar10.yaml). It leaves a model without an outlier as it is (v1:596-602). It
also inverts on cropped and flipped images (:258), of another 5 % of the training set for each class and for the
unlearning (:262, :612), where ours has one clean subset, and unlearns trigger images whose mask was stretched to [0, 1]
on its way through a file (:251, :623), ours not.

Departures. A class that is never reached keeps its last mask, as in the authors' code (visualizer.py:455-461); v1 keeps
that of its first epoch (:411-414). Adam works on each value by itself and the model is in eval mode, so all classes are
inverted at once, on the same batches, with the results of inverting one after the other. `steps` is reduced. Norms are
those of the masks, not of the masks rounded to 8 bits. Images are in [0, 1] without normalisation.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from math import ceil

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses import ft
from reproduce.data.augment import Augment, apply, draw, take, to_input
from reproduce.defending import Clean, Defended
from reproduce.errors import UserError
from reproduce.rng import generator
from reproduce.training import Observer, Recipe, predict, silent, train

REPORT = 10     # every how many steps an inversion reports
THRESHOLD = 2.0     # of the outlier index: mad_outlier_detection.py:49


@dataclass(frozen=True)
class Inversion:
    """How to search for triggers. A step is `batches` batches; the schedule moves between steps."""

    # batches: None is one pass over the clean images. ones: start from an almost full, white trigger, not a random one.
    steps: int = field(default=80, metadata={"smoke": 2})      # bench nc_epoch; gtsrb_visualize_example.py:53 has 1000
    batches: int | None = field(default=31, metadata={"smoke": 2})     # :54-55, 1000 // 32
    batch: int = 32                             # :51
    rate: float = 0.1                           # :52
    betas: tuple[float, float] = (0.5, 0.9)     # visualizer.py:250
    success: float = 0.99                       # gtsrb_visualize_example.py:60
    cost: float = 1e-3                          # :56
    from_zero: bool = True                      # visualizer.py:41: no penalty until it succeeds
    factor: float = 2.0                         # gtsrb_visualize_example.py:62
    patience: int = 5                           # :61
    stop_ratio: float = 1.0                     # :66
    stop_patience: int = 25                     # :67
    ones: bool = field(default=False, metadata={"since": "fmp"})

    def __post_init__(self) -> None:
        if min(self.steps, self.batches or 1, self.batch, self.patience) < 1 or not 0 < self.success <= 1:
            raise UserError("inversion needs steps, batches, batch and patience of at least 1 and a success in (0, 1]")


INVERSION = Inversion()

UNLEARNING = Recipe(
    epochs=1,                                   # unconfirmed: from memory of the paper, which we could not read
    rates=((0, 0.01),),                         # bench lr; its schedule of 100 epochs is not NC's
    batch=64,                                   # ours, that of the other rows
    momentum=0.9, nesterov=False, weight_decay=5e-4,        # bench client_optimizer, sgd_momentum, wd
    augment=Augment(crop=4, flip=True),         # bench get_transform
)


@dataclass(frozen=True)
class Config:
    """target: the label to unlearn, or None to find it."""

    target: int | None = None
    threshold: float = THRESHOLD
    # Of an even number of norms: False, the mean of the two in the middle; True, the lower one, as torch.median.
    lower_median: bool = field(default=False, metadata={"since": "fmp"})
    only_flagged: bool = False                  # ours; True: no outlier, no repair
    share: float = 0.2                          # bench unlearning_ratio
    inversion: Inversion = INVERSION
    recipe: Recipe = UNLEARNING

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"NC stamps a share in (0, 1] of the clean images, not {self.share}")


SETTINGS = {
    ("mcldef", "described"): Config(),
    ("mcldef", "granted"): Config(target=5),    # ours: NC with the knowledge the released MCLDef has
    ("fmp", "described"): Config(
        lower_median=True,                      # v1:425-426
        only_flagged=True,                      # v1:596-602
        inversion=Inversion(
            batches=None, batch=256,            # yaml batch_size, v1:314
            success=0.98, from_zero=False,      # yaml atk_succ_threshold; v1:208
            stop_ratio=0.99,                    # yaml early_stop_threshold
            ones=True,                          # v1:560-561
        ),
        recipe=ft.BENCH,                        # yaml, v1:652-656
    ),
}


def requires(config: Config) -> frozenset[str]:
    """Nothing but the clean images."""
    return frozenset()


def work(config: Config, images: int, classes: int) -> float:
    """The inversion of every class, or of the one it is told."""
    return inversion_work(config.inversion, images, 1 if config.target is not None else classes)


def inversion_work(settings: Inversion, images: int, classes: int) -> float:
    """Images that go forwards and backwards, if no class stops early."""
    return settings.steps * (settings.batches * settings.batch if settings.batches else images) * classes


def defend(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent,
           clean_model: nn.Module | None = None) -> Defended:
    """A copy of `model` that unlearnt the inverted triggers of the suspected labels.

    info: the labels and how they were found, each inverted class's mask norm, and the trigger's success (percent) on
    clean images of other classes. tensors: trigger (3, H, W) and mask (H, W) of the first suspect, masks (K, H, W).
    """
    if config.target is None:
        found = invert_classes(model, clean, range(clean.num_classes), config.inversion, seed, observe)
        estimate = estimate_target(found.masks, config.threshold, config.lower_median)
        info = estimate.describe() | {"inversion_steps": found.steps}
        suspects = estimate.flagged or ([] if config.only_flagged else [estimate.target])
    else:
        check_target(config.target, clean)
        found = invert_classes(model, clean, (config.target,), config.inversion, seed, observe)
        info = {"target": config.target, "target_from": "granted", "mask_norms": found.norms()}
        suspects = [config.target]
    repaired = deepcopy(model).requires_grad_(True).eval()
    info["unlearnt"] = suspects
    if not suspects:
        return Defended(repaired, info, {"masks": found.masks})
    mask, pattern = found.trigger(suspects[0])
    info["success"] = success_rate(frozen(model), stamp(clean.images, mask, pattern), clean.labels, suspects[0])
    images = stamp_share(clean.images, [found.trigger(label) for label in suspects], config.share, seed)
    train(repaired, images, clean.labels, config.recipe, seed, phase="unlearning", observe=observe)
    return Defended(repaired, info, {"trigger": pattern, "mask": mask, "masks": found.masks})


def check_target(target: int, clean: Clean) -> None:
    """Raises UserError for a label the data set does not have."""
    if not 0 <= target < clean.num_classes:
        raise UserError(f"target {target}: the labels are 0 to {clean.num_classes - 1}")


# Step 1: triggers


@dataclass
class Inverted:
    """Triggers of the classes `classes`. masks: (K, H, W) and patterns: (K, 3, H, W) in [0, 1]; steps: (K)."""

    classes: tuple[int, ...]
    masks: Tensor
    patterns: Tensor
    steps: list[int]

    def trigger(self, label: int) -> tuple[Tensor, Tensor]:
        """Mask (H, W) and pattern (3, H, W) of one class."""
        at = self.classes.index(label)
        return self.masks[at], self.patterns[at]

    def norms(self) -> list[float]:
        """L1 norm of each mask."""
        return self.masks.sum((1, 2)).tolist()


@dataclass
class Schedule:
    """Weight `cost` of the size penalty: times `factor` after `patience` successful steps in a row, divided by
    factor^1.5 after as many failures. From 0 it first becomes `initial`."""

    initial: float
    factor: float
    patience: int
    cost: float
    raised: bool = False
    lowered: bool = False
    waited: int = 0
    successes: int = 0
    failures: int = 0

    def update(self, succeeded: bool) -> None:
        """Hear of one step."""
        self.waited = self.waited + 1 if succeeded and self.cost == 0 else 0
        if self.waited >= self.patience:
            self.cost, self.successes, self.failures = self.initial, 0, 0
            self.raised = self.lowered = False
        self.successes, self.failures = (self.successes + 1, 0) if succeeded else (0, self.failures + 1)
        if self.successes >= self.patience:
            self.successes, self.raised = 0, True
            self.cost *= self.factor
        elif self.failures >= self.patience:
            self.failures, self.lowered = 0, True
            self.cost /= self.factor ** 1.5


class Search:
    """What is remembered of one class between steps: the best norm, the schedule, whether to go on."""

    def __init__(self, settings: Inversion) -> None:
        self.settings = settings
        self.schedule = Schedule(settings.cost, settings.factor, settings.patience,
                                 cost=0.0 if settings.from_zero else settings.cost)
        self.best = self.best_before = float("inf")
        self.stalled = self.steps = 0
        self.done = False

    def update(self, norm: float, success: float) -> bool:
        """Hear of one step's mean mask norm and success; says whether to keep its trigger: the best, or the last as
        long as none succeeded."""
        self.steps += 1
        succeeded = success >= self.settings.success
        better = succeeded and norm < self.best
        self.best = norm if better else self.best
        if self.best < float("inf"):
            self.stalled = self.stalled + 1 if self.best >= self.settings.stop_ratio * self.best_before else 0
        self.best_before = min(self.best, self.best_before)
        self.done = self.schedule.raised and self.schedule.lowered and self.stalled >= self.settings.stop_patience
        if not self.done:
            self.schedule.update(succeeded)
        return better or self.best == float("inf")


def invert_classes(model: nn.Module, clean: Clean, classes: Sequence[int], settings: Inversion, seed: int,
                   observe: Observer = silent) -> Inverted:
    """`invert` on the clean images, pass after pass, from random masks and patterns or full ones."""
    rng, device = generator(seed, "trigger", "inversion"), clean.images.device
    start = torch.rand((len(classes), 4, *clean.images.shape[-2:]), generator=rng).sub_(0.5).mul_(2 - 1e-6).atanh_()
    if settings.ones:
        start.fill_(1.0)
    if settings.batches is None:
        settings = replace(settings, batches=ceil(len(clean.images) / settings.batch))
    batches = chain.from_iterable(one_pass(clean.images, settings.batch, generator(seed, "order", "inversion", number))
                                  for number in count())
    return invert(frozen(model), batches, tuple(classes), start.to(device), settings, observe)


def invert(model: nn.Module, batches: Iterator[Tensor], classes: tuple[int, ...], start: Tensor,
           settings: Inversion, observe: Observer = silent) -> Inverted:
    """The smallest successful trigger of each class, or the last one where none succeeded.

    model: frozen, in eval mode. batches: float images (N, 3, H, W) in [0, 1], without end. start: (K, 4, H, W), mask
    and pattern before the tanh.
    """
    theta = start.clone().requires_grad_()
    best = _squash(start)
    optimizer = torch.optim.Adam([theta], settings.rate, settings.betas)
    searches = [Search(settings) for _ in classes]
    labels = torch.tensor(classes, device=start.device)
    for step in range(settings.steps):
        active = torch.tensor([i for i, search in enumerate(searches) if not search.done], device=start.device)
        costs = start.new_tensor([search.schedule.cost for search in searches])
        sums = start.new_zeros(3, len(classes))     # cross-entropy, norm, success
        for images in islice(batches, settings.batches):
            optimizer.zero_grad()
            for part in active.split(_classes_at_once(images)):
                sums[:, part] += _backward(model, images, theta, part, labels, costs)
            optimizer.step()
        _, norms, successes = (sums / settings.batches).tolist()
        kept = [i for i in active.tolist() if searches[i].update(norms[i], successes[i])]
        best[kept] = _squash(theta.detach()[kept])
        if step % REPORT == 0:
            entropy, norm, success = (sums[:, active].mean(1) / settings.batches).tolist()
            loss = ((sums[0] + costs * sums[1])[active].mean() / settings.batches).item()
            observe("inversion", step + 1, settings.steps, model, {
                "epoch": step + 1, "loss": loss, "ce": entropy, "norm": norm, "success": success,
                "classes": len(active)})
        if all(search.done for search in searches):
            break
    return Inverted(classes, best[:, 0], best[:, 1:], [search.steps for search in searches])


def _backward(model: nn.Module, images: Tensor, theta: Tensor, part: Tensor, labels: Tensor,
              costs: Tensor) -> Tensor:
    """Add the gradient of the classes `part` (indices into K) to that of theta: (K, 4, H, W); returns (3, |part|)."""
    triggers = _squash(theta[part])
    masks, patterns = triggers[:, :1], triggers[:, 1:]
    stamped = torch.lerp(images, patterns[:, None], masks[:, None]).flatten(0, 1)
    wanted = labels[part].repeat_interleave(len(images))
    logits = model(stamped.contiguous(memory_format=torch.channels_last))
    entropies = F.cross_entropy(logits, wanted, reduction="none").view(len(part), -1).mean(1)
    norms = masks.sum((1, 2, 3))
    (entropies + costs[part] * norms).sum().backward()
    successes = (logits.detach().argmax(1) == wanted).float().view(len(part), -1).mean(1)
    return torch.stack([entropies.detach(), norms.detach(), successes])


def _squash(theta: Tensor) -> Tensor:
    return theta.tanh() / 2 + 0.5


def _classes_at_once(images: Tensor) -> int:
    """All on a GPU; on a CPU as many as fill about 128 images, beyond which activations leave the cache."""
    return 1_000 if images.is_cuda else max(1, 128 // len(images))


def frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode that takes no gradients."""
    return deepcopy(model).eval().requires_grad_(False)


def one_pass(images: Tensor, batch: int, rng: torch.Generator, augment: Augment = Augment(),
             drop_last: bool = False) -> Iterator[Tensor]:
    """All images once, in random order, as float batches (n, 3, H, W). images: uint8 (N, 3, H, W).

    drop_last leaves out a smaller last batch, unless it is the only one.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    order = torch.randperm(len(images), generator=rng)
    if drop_last:
        order = order[:max(batch, len(order) // batch * batch)]
    for index in order.split(batch):
        part = take(images, index.to(images.device))
        if augment.active:
            part = apply(part, draw(len(index), images.shape[-1], augment, rng).to(images.device), augment)
        yield to_input(part)


# Step 2: the outlier


@dataclass
class Estimate:
    """Target and outlier index from the masks' norms; flagged: labels beyond the threshold, smallest mask first."""

    target: int
    index: float
    flagged: list[int]
    norms: list[float]

    def describe(self) -> dict[str, object]:
        """For `Defended.info`."""
        return {"target": self.target, "target_from": "estimated", "mask_norms": self.norms,
                "anomaly_index": self.index, "flagged": self.flagged}


def estimate_target(masks: Tensor, threshold: float = THRESHOLD, lower_median: bool = False) -> Estimate:
    """The target is the class with the smallest mask. masks: (K, H, W), one of each class."""
    norms = masks.sum((1, 2)).tolist()
    index, flagged = outliers(norms, threshold, lower_median)
    return Estimate(int(np.argmin(norms)), index, flagged, norms)


def outliers(norms: Sequence[float], threshold: float = THRESHOLD,
             lower_median: bool = False) -> tuple[float, list[int]]:
    """The anomaly index of the smallest norm, and the labels of all norms that are too small, smallest first."""
    def middle(of: np.ndarray) -> float:
        return float(np.sort(of)[(len(of) - 1) // 2] if lower_median else np.median(of))

    values = np.asarray(norms)
    median = middle(values)
    # 1.4826 makes the median absolute deviation that of a normal distribution; equal norms are no outliers.
    deviation = max(1.4826 * middle(np.abs(values - median)), 1e-12)
    indices = (median - values) / deviation
    return float(indices.max()), [int(i) for i in np.argsort(values, kind="stable") if indices[i] > threshold]


# Step 3: unlearning


def stamp(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """(1 - m) x + m t, rounded. images: uint8 (N, 3, H, W), mask: (H, W), pattern: (3, H, W) -> uint8."""
    return torch.lerp(images.float(), 255 * pattern, mask).round_().to(torch.uint8)


def stamp_share(images: Tensor, triggers: Sequence[tuple[Tensor, Tensor]], share: float, seed: int) -> Tensor:
    """A copy of the images (uint8, (N, 3, H, W)) a random share of which carries the triggers, dealt out in turn."""
    chosen = torch.randperm(len(images), generator=generator(seed, "unlearning"))[:round(share * len(images))]
    stamped = images.clone()
    for first, trigger in enumerate(triggers):
        index = chosen[first::len(triggers)].to(images.device)
        stamped[index] = stamp(images[index], *trigger)
    return stamped


def success_rate(model: nn.Module, stamped: Tensor, labels: Tensor, target: int) -> float:
    """Percent of the stamped images (uint8) of other classes that are taken for the target."""
    others = labels != target
    return 100 * (predict(model, stamped[others]) == target).float().mean().item() if others.any() else 0.0
