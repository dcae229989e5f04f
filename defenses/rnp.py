"""RNP: Reconstructive Neuron Pruning (Li et al., ICML 2023, arXiv:2305.14876).

Make the model forget the clean task, and what is left of it is the backdoor. Let masks bring the clean task back, and
the channels they must close to do so are the backdoor's. A neuron is a channel of a BatchNorm with scale g, shift b:

    unlearn:  w' = the victim after maximising  CE(f_w(x), y)  over all w, until clean training accuracy <= forgotten
    recover:  minimise over m in [0, 1], from m = 1:   alpha CE(f_{w', m}(x), y)      output_c = m_c g_c z_c + b_c
    prune:    the victim's channels with m_c <= threshold lose their scale

The unlearnt model is thrown away. The shift stays, as in the official code (main.py:116-120) and in ANP, whose masks
these are: training, curve and pruning are those of `defenses.anp` without its perturbation.

Constants: bboylyg/RNP@eeae192, main.py. Batch statistics in both trainings (:28, :50) are the official code's.
Its clipping of gradients has no effect, since it comes before there are any (:41-42).

How many images. Both trainings see 500 images, the official default (--ratio 0.01 of 50,000; the README says so) and
BackdoorBench's (config.yaml: ratio 0.01, where its other defenses have more): unlearning is to stop some ten epochs of
four steps after the start, as soon as accuracy has fallen, and is looked at once an epoch. With all of a larger clean
subset one epoch is enough to unlearn far too much; a PreAct-ResNet18 does not even survive it. What a defender has
beyond these images holds out.

Which threshold. The official script prints test accuracy and ASR at each threshold of a grid and chooses none
(:155-174). BackdoorBench@f02e353 (defense/rnp.py) takes the lowest test ASR among those that change test accuracy by
less than a relative 10 % (:860-863), and prunes again at a fixed 0.7 (:571, :989). Ours by default holds clean images
out of both trainings and, going up the official grid, stops before held-out accuracy first falls by more than
`tolerance` points: the rule of FP and ANP. ("rnp", "bench") has BackdoorBench's tolerance, on held-out images, and else
the values above (its batches are of 256, config.yaml:14, and its unlearning ends an epoch earlier, :914). A fixed
threshold needs none.

Departures. Where accuracy never falls to `forgotten`, the official script fails for want of a file; ours goes on with
what the last epoch left. Images are in [0, 1]; normalisation is a matter of the model. The paper's text was not
readable to us.
"""

from copy import deepcopy
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from defenses import anp
from reproduce.data.augment import Augment
from reproduce.defending import Clean, Defended, split_validation
from reproduce.errors import UserError
from reproduce.training import Loss, LossFunction, Observer, Recipe, silent, train

UNLEARNING = Recipe(
    epochs=21,                                              # at most; :346, :208
    rates=((0, 0.01), (10, 1e-3), (20, 1e-4)),              # :344, :325, :204
    batch=128, momentum=0.9, nesterov=False, weight_decay=5e-4,     # :328, :203
    augment=Augment(crop=4, flip=True),                     # data/poison_tool_cifar.py:53-55
)
RECOVERING = Recipe(
    epochs=20,                                              # :347
    rates=((0, 0.2),),                                      # :345
    batch=128, momentum=0.9, nesterov=False, weight_decay=0.0,      # :328, :253
    augment=Augment(crop=4, flip=True),
)


@dataclass(frozen=True)
class Config:
    """threshold: a fixed one, or None to choose it on held-out clean images."""

    subset: int = 500               # images that both trainings see, at most; --ratio, :332, and README
    forgotten: float = 20.0         # percent of training accuracy that ends the unlearning; :343, :222
    alpha: float = 0.2              # :342
    threshold: float | None = None
    highest: float = 0.9            # of the grid; :350
    spacing: float = 0.05           # of the grid; :351
    tolerance: float = 4.0          # ours, as FP's: percentage points of held-out accuracy
    relative: bool = False          # or percent of the victim's
    validation: float = 0.2         # ours, as FP's: share of the clean images held out, at least
    unlearning: Recipe = field(default=UNLEARNING, metadata={"short": UNLEARNING.epochs})    # short at 500 images
    recovering: Recipe = field(default=RECOVERING, metadata={"short": RECOVERING.epochs})

    def __post_init__(self) -> None:
        if self.subset < 1 or not 0 <= self.forgotten <= 100 or self.alpha <= 0:
            raise UserError("RNP needs images, an accuracy to unlearn down to in percent and a positive alpha, not "
                            f"subset={self.subset}, forgotten={self.forgotten}, alpha={self.alpha}")
        anp.check_choice("RNP", self)


SETTINGS = {
    ("rnp", "released"): Config(),
    ("rnp", "bench"): Config(tolerance=10.0, relative=True),        # BackdoorBench, config/defense/rnp/config.yaml:29
}


def requires(config: Config) -> frozenset[str]:
    """Nothing but the clean images."""
    return frozenset()


def trained(config: Config, images: int) -> int:
    """How many images go through its two trainings, if the first one is not ended early."""
    part = images if config.threshold is not None else images - round(config.validation * images)
    return (config.unlearning.epochs + config.recovering.epochs) * min(part, config.subset)


def defend(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent,
           clean_model: nn.Module | None = None) -> Defended:
    """A copy of `model` without the channels whose mask ends at or below the threshold.

    info and tensors: those of `anp.prune`, and the training accuracy (percent) of each epoch of unlearning.
    """
    part, held_out = split(clean, config, seed)
    unlearnt, accuracies = unlearn(model, part, config, seed, observe)
    defended = anp.prune(model, recover(unlearnt, part, config, seed, observe), held_out, config)
    defended.info["unlearning_acc"] = accuracies
    return defended


def split(clean: Clean, config: Config, seed: int) -> tuple[Clean, Clean | None]:
    """What both trainings see, at most `subset`, and the rest, which the threshold is chosen on unless it is fixed."""
    spare = 1 - config.subset / len(clean.images)
    if config.threshold is None:
        return split_validation(clean, max(config.validation, spare), seed)
    return (split_validation(clean, spare, seed)[0] if spare > 0 else clean), None


def unlearn(model: nn.Module, clean: Clean, config: Config, seed: int,
            observe: Observer = silent) -> tuple[nn.Module, list[float]]:
    """A copy of `model` that has forgotten `clean`, and its training accuracy (percent) in every epoch."""
    unlearnt = deepcopy(model).requires_grad_(True)
    history = train(unlearnt, clean.images, clean.labels, config.unlearning, seed, phase="unlearning", loss=ascent,
                    observe=observe, until=lambda row: row["train_acc"] <= config.forgotten)
    return unlearnt, [row["train_acc"] for row in history]


def ascent(model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
    """The cross-entropy with its sign turned round."""
    logits = model(images)
    return Loss(-F.cross_entropy(logits.float(), labels), logits)


def recover(unlearnt: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent) -> Tensor:
    """The mask (C,) over the channels of the unlearnt model. Observers see that model with its soft mask."""
    masked = anp.Masked(unlearnt, 0.0, 1, seed)
    train(masked, clean.images, clean.labels, config.recovering, seed, phase="recovering",
          loss=recovery(config.alpha), observe=observe, project=anp.clamp_mask)
    return masked.mask.detach()


def recovery(alpha: float) -> LossFunction:
    """alpha CE of the masked model, for `train`."""
    def loss(masked: anp.Masked, images: Tensor, labels: Tensor) -> Loss:
        logits = masked(images)
        return Loss(alpha * F.cross_entropy(logits.float(), labels), logits)

    return loss
