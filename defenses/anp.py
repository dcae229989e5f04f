"""ANP: Adversarial Neuron Pruning (Wu & Wang, NeurIPS 2021, arXiv:2110.14430).

The neurons of a backdoor are those that ruin clean predictions soonest when all neurons are perturbed. A neuron is a
channel of a BatchNorm with scale g and shift b; over all channels c of the net a mask m is trained on clean images:

    output_c = (m_c + d_c) g_c z_c + (1 + x_c) b_c              z: the normalised input of the BatchNorm
    minimise over m in [0, 1]:  alpha CE(m, 0, 0) + (1 - alpha) max over (d, x) of CE(m, d, x)
    the maximum by sign steps from a random start:  (d, x) ~ U[-eps, eps],  then  += eps / steps * sign(gradient)

Then every channel with m_c <= threshold loses its scale (g_c = 0): it is the constant b_c on any input. The shift
stays, as in the official code (pn:108-112); all else is the victim's, BatchNorm statistics too.

Constants: csdongxian/ANP_backdoor@ec7b179 (oc: optimize_mask_cifar.py, pn: prune_neuron_cifar.py). Batch statistics
during mask training (oc:173) and a perturbation that is not cut back to eps after the step, so that it reaches 2 eps
(oc:183-193), are the official code's.

Which threshold. The official script prints test accuracy and ASR at each threshold of a grid and chooses none
(pn:133-152). BackdoorBench takes the lowest test ASR, below the victim's, among the thresholds that change test
accuracy by less than a relative 10 % (@f02e353, defense/anp.py:684-687; in v1, FMP's substrate,
huangd1999/BackdoorBench@6135839, defense/anp/anp.py:266-269); so does the setting "oracle", with the mask of the
default one. Both look at test data. Ours by default holds clean images out from the mask training and, going up the
official grid, stops before held-out accuracy first falls by more than `tolerance`: FP's rule. In ("fmp", "described")
that is a relative 10 %. The mask is kept with the run, so that what another threshold would have pruned can be told,
and measured, afterwards. A fixed threshold needs no held-out images.

Departures. Batches come from passes over the images instead of draws with replacement (oc:81), and `iterations` is
rounded up to whole passes. Images are in [0, 1]; normalisation is a matter of the model. The paper's text was not
readable to us; that it prunes at FIXED is unconfirmed, and no file of its repository says so.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from defenses import fp
from reproduce.data.augment import Augment
from reproduce.defending import Clean, Defended, split_validation
from reproduce.errors import UserError
from reproduce.rng import generator
from reproduce.training import Loss, LossFunction, Observer, Recipe, predict, silent, train

RELEASED = Recipe(
    epochs=1,                                       # at least; `iterations` makes more of them
    rates=((0, 0.2),),                              # oc:22
    batch=128, momentum=0.9, nesterov=False,        # oc:21,97
    weight_decay=0.0,                               # oc:97
    augment=Augment(crop=4, flip=True),             # oc:50-51
)

FIXED = 0.2     # the paper's threshold, unconfirmed: for Config(threshold=FIXED)


@dataclass(frozen=True)
class Config:
    """threshold: a fixed one, or None to choose it on held-out clean images. recipe: how the masks are trained."""

    eps: float = 0.4                # oc:35
    steps: int = 1                  # of the perturbation; oc:36
    alpha: float = 0.2              # oc:37
    iterations: int = field(default=2000, metadata={"smoke": 5, "short": 500})  # oc:23
    threshold: float | None = None
    highest: float = 0.9            # of the grid; pn:32
    spacing: float = 0.05           # of the grid; pn:33
    tolerance: float = 4.0          # ours, as FP's: percentage points of held-out accuracy
    validation: float = 0.2         # ours, as FP's: share of the clean images held out
    recipe: Recipe = RELEASED
    # Whether tolerance is a percentage of the victim's held-out accuracy instead.
    relative: bool = field(default=False, metadata={"since": "fmp"})
    # The threshold by test ASR, out of those that change test accuracy by less than `change` percent of it.
    oracle: bool = field(default=False, metadata={"since": "the oracle row"})
    change: float = field(default=10.0, metadata={"since": "the oracle row"})   # v1: anp.py:266

    def __post_init__(self) -> None:
        if self.eps < 0 or self.steps < 1 or self.iterations < 1:
            raise UserError("ANP needs eps >= 0 and at least one perturbation step and one iteration, not "
                            f"eps={self.eps}, steps={self.steps}, iterations={self.iterations}")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"ANP's alpha weighs two losses and lies in [0, 1], not at {self.alpha}")
        check_choice("ANP", self)


class Choice(Protocol):
    """The part of a configuration that says which masked channels go; RNP has it too."""

    threshold: float | None
    highest: float
    spacing: float
    tolerance: float
    validation: float
    relative: bool


def check_choice(method: str, config: Choice) -> None:
    """Raises UserError for a threshold, grid or tolerance that cannot be."""
    if config.threshold is not None and not 0 <= config.threshold < 1:
        raise UserError(f"{method}'s threshold lies in [0, 1), where masks do, not at {config.threshold}")
    if not (config.spacing > 0 and 0 <= config.highest < 1):
        raise UserError(f"{method}'s grid of thresholds needs a positive spacing and an end in [0, 1), not "
                        f"spacing={config.spacing}, highest={config.highest}")
    if config.tolerance < 0 or not 0 < config.validation < 1:
        raise UserError(f"{method} needs tolerance >= 0 and a held-out share in (0, 1), not "
                        f"tolerance={config.tolerance}, validation={config.validation}")


SETTINGS = {
    ("anp", "released"): Config(),
    ("mcldef", "oracle"): Config(oracle=True),
    ("mcldef", "described"): Config(),          # MCLDef names no settings: those of the method's own repository
    ("fmp", "described"): Config(               # v1: config/defense/anp/cifar10.yaml, anp.py:266
        tolerance=10.0, relative=True, recipe=replace(RELEASED, batch=256)),
}


def requires(config: Config) -> frozenset[str]:
    """Nothing but the clean images, and for the oracle test accuracy and ASR."""
    return frozenset({"test-asr"} if config.oracle else ())


def builds_on(config: Config) -> tuple[str, Config] | None:
    """The oracle prunes by the mask that the same settings without it train."""
    return ("anp", replace(config, oracle=False)) if config.oracle else None


def work(config: Config, images: int, classes: int) -> float:
    """Perturbation and mask go forwards and backwards, the clean loss adds a little; the oracle trains nothing."""
    return 0 if config.oracle else 2.5 * config.iterations * config.recipe.batch


def defend(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent,
           clean_model: nn.Module | None = None, base: dict[str, Tensor] | None = None) -> Defended:
    """A copy of `model` without the channels whose mask ends at or below the threshold; the rest as in `prune`, or for
    the oracle as in `prune_by_asr`. base: the tensors of the run that `builds_on` names."""
    if config.oracle:
        if clean.measured is None or base is None:
            raise UserError("this setting of ANP chooses its threshold by test ASR and was granted none: choose "
                            "another")
        return prune_by_asr(model, base["mask"].to(clean.images.device), clean.measured, config)
    part, held_out = split(clean, config, seed)
    return prune(model, train_mask(model, part, config, seed, observe), held_out, config)


def split(clean: Clean, config: Choice, seed: int) -> tuple[Clean, Clean | None]:
    """What masks are trained on, and what the threshold is chosen on unless it is fixed."""
    return (clean, None) if config.threshold is not None else split_validation(clean, config.validation, seed)


def prune(model: nn.Module, mask: Tensor, held_out: Clean | None, config: Choice) -> Defended:
    """A copy of `model` without the channels whose mask, (C,), is at or below the fixed or chosen threshold.

    info: the threshold (None: even the lowest costs too much, nothing is pruned), the number of pruned channels and of
    all, all mask values in ascending order, and if it was chosen the held-out accuracy (percent) of the victim and at
    every threshold of the grid. tensors: the mask in the order of `batch_norms`.
    """
    threshold, info = config.threshold, {}
    if held_out is not None:
        grid = thresholds(config)
        curve = pruning_curve(model, mask, grid, held_out)
        count = fp.pruned_count(curve, fp.points(config.tolerance, config.relative, curve[0]))
        threshold = grid[count - 1] if count else None      # the curve's first entry is the victim
        info = {"validation_acc": curve[0], "validation_curve": list(zip(grid, curve[1:], strict=True))}
    return _cut(model, mask, threshold, info)


def prune_by_asr(model: nn.Module, mask: Tensor, measured: Callable[[nn.Module], tuple[float, float]],
                 config: Config) -> Defended:
    """A copy of `model` without the channels whose mask, (C,), is at or below the threshold of the lowest test ASR, the
    lowest of equals, among those that lower it and change test accuracy by less than `change` percent of it.

    info: as of `prune`, with test accuracy and ASR (percent) at every threshold of the grid. tensors: the mask.
    """
    before, worst = measured(model)
    curve = [(threshold, *measured(pruned(model, mask <= threshold))) for threshold in thresholds(config)]
    fine = [(asr, threshold) for threshold, acc, asr in curve
            if asr < worst and abs(before - acc) < config.change * before / 100]
    threshold = min(fine)[1] if fine else None
    info = {"test_acc": before, "test_curve": curve}
    return _cut(model, mask, threshold, info)


def _cut(model: nn.Module, mask: Tensor, threshold: float | None, info: dict[str, Any]) -> Defended:
    channels = torch.zeros_like(mask, dtype=torch.bool) if threshold is None else mask <= threshold
    return Defended(pruned(model, channels), {
        "threshold": threshold, "pruned": int(channels.sum()), "channels": len(mask),
        "masks": [round(value, 4) for value in mask.sort().values.tolist()], **info}, {"mask": mask})


def batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Every BatchNorm with a scale and a shift, by name: their channels, in this order, are the C neurons."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
             and module.affine}
    if not norms:
        raise UserError(f"ANP prunes BatchNorm channels and this {type(model).__name__} has none: use another defense")
    return norms


class Masked(nn.Module):
    """`model` with the one trainable parameter `mask`, (C,). The model's own weights are those of a frozen copy."""

    def __init__(self, model: nn.Module, eps: float, iterations: int, seed: int) -> None:
        super().__init__()
        self.frame = deepcopy(model).requires_grad_(False)
        scale = torch.cat([norm.weight for norm in batch_norms(self.frame).values()])
        self.mask = nn.Parameter(torch.ones_like(scale))
        # Drawn for the whole training in advance, so that a GPU sees the same ones.
        starts = torch.rand(iterations, 2, len(scale), generator=generator(seed, "anp perturbation"))
        self.register_buffer("starts", (eps * (2 * starts - 1)).to(scale.device))
        # A counter on the device, so that a graph-captured training goes on with the right start.
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64, device=scale.device))

    def next_start(self) -> Tensor:
        """The start of this iteration's perturbation: (2, C), of scales and of shifts."""
        start = self.starts.index_select(0, self.step)[0]
        self.step.add_(1)
        return start

    def forward(self, images: Tensor, perturbation: Tensor | None = None) -> Tensor:
        """Logits (N, K) of the model with masked and, if given a (2, C), perturbed BatchNorms."""
        scale, shift = self.mask, torch.ones_like(self.mask)
        if perturbation is not None:
            scale, shift = scale + perturbation[0], shift + perturbation[1]
        norms = batch_norms(self.frame)
        sizes = [norm.num_features for norm in norms.values()]
        weights = {}
        for (name, norm), by, moved in zip(norms.items(), scale.split(sizes), shift.split(sizes), strict=True):
            weights[f"{name}.weight"], weights[f"{name}.bias"] = norm.weight * by, norm.bias * moved
        return functional_call(self.frame, weights, (images,))


def train_mask(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent) -> Tensor:
    """The mask (C,) after at least `iterations` steps. Observers see the model with its soft mask."""
    steps = ceil(len(clean.images) / config.recipe.batch)
    recipe = replace(config.recipe, epochs=max(config.recipe.epochs, ceil(config.iterations / steps)))
    masked = Masked(model, config.eps, recipe.epochs * steps, seed)
    train(masked, clean.images, clean.labels, recipe, seed, phase="mask", loss=mask_loss(config), observe=observe,
          project=clamp_mask)
    return masked.mask.detach()


def mask_loss(config: Config) -> LossFunction:
    """alpha CE + (1 - alpha) CE under the worst perturbation found, for `train`; with eps = 0 the first term alone."""
    def loss(masked: Masked, images: Tensor, labels: Tensor) -> Loss:
        terms = {}
        if config.eps:
            worst = perturb(masked, images, labels, config)
            terms["robust"] = (1 - config.alpha) * F.cross_entropy(masked(images, worst).float(), labels)
        logits = masked(images)
        terms["natural"] = config.alpha * F.cross_entropy(logits.float(), labels)
        return Loss(sum(terms.values()), logits, terms)

    return loss


def perturb(masked: Masked, images: Tensor, labels: Tensor, config: Config) -> Tensor:
    """The perturbation (2, C) of scales and shifts, after `steps` sign steps up the loss from the next start."""
    perturbation = masked.next_start()
    for _ in range(config.steps):
        perturbation = perturbation.detach().requires_grad_(True)
        gradient, = torch.autograd.grad(F.cross_entropy(masked(images, perturbation).float(), labels), perturbation)
        perturbation = perturbation + config.eps / config.steps * gradient.sign()
    return perturbation.detach()


@torch.no_grad()
def clamp_mask(masked: Masked) -> None:
    """Back into [0, 1], in place."""
    masked.mask.clamp_(0.0, 1.0)


def thresholds(config: Choice) -> list[float]:
    """0, spacing, 2 spacing, ... highest."""
    return [round(k * config.spacing, 10) for k in range(round(config.highest / config.spacing) + 1)]


def pruning_curve(model: nn.Module, mask: Tensor, grid: list[float], clean: Clean) -> list[float]:
    """Accuracy (percent) on `clean` of `model` as it is, then pruned at every threshold of `grid`."""
    curve = []
    for threshold in (-1.0, *grid):     # masks are not negative: the first prunes nothing
        labels = predict(pruned(model, mask <= threshold), clean.images)
        curve.append(100 * (labels == clean.labels.cpu()).sum().item() / len(labels))
    return curve


@torch.no_grad()
def pruned(model: nn.Module, channels: Tensor) -> nn.Module:
    """A copy of `model`, in eval mode, where the BatchNorm channels of bool (C,) `channels` have scale 0."""
    copy = deepcopy(model).eval()
    norms = list(batch_norms(copy).values())
    for norm, part in zip(norms, channels.split([norm.num_features for norm in norms]), strict=True):
        norm.weight.masked_fill_(part, 0.0)
    return copy
