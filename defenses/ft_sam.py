"""FT-SAM: fine-tuning with sharpness-aware minimisation (Zhu et al., ICCV 2023, arXiv:2304.11823).

Plain fine-tuning stays in the valley where the backdoor lives. So every step follows the gradient at the worst nearby
weights instead, where "nearby" is measured relative to each weight, so that large ones move most:

    g = gradient of L at w        e = rho w^2 g / ||  |w| g  ||        (adaptive SAM; products elementwise, one norm)
    w <- SGD step from w along the gradient of L at w + e               the weight decay is that of w
    L = cross-entropy with a smoothed label: 1 - s for the class, s / (K - 1) for every other

Constants: SCLBD/BackdoorBench@f02e353 (ft: defense/ft-sam.py, sam: utils/defense_utils/sam/sam.py, yaml:
config/defense/ft-sam/cifar10.yaml); no repository of the paper's own was found. Both passes use batch statistics and
only the first counts for the running ones (sam:168, util.py:6-12). The gradient decomposition of sam:174 has weight 0
(yaml:32) and is left out.

The learning rate. The official loop advances its cosine after every batch (ft:302), not after every epoch as the 100
epochs and the T_max of 100 suggest. So the rate falls to 0 within 100 steps and rises again, five times up and down in
100 epochs of 10 batches, and ends where it began. `annealed` is that half period in steps, for ("ft_sam", "released");
("ft_sam", "described") has the cosine over 100 epochs. The recorded rate is that of the recipe's epochs.

GTSRB. Its file there (gtsrb.yaml) has rho 8 and no smoothing, which never take effect: the script's arguments have
defaults for both, and they overwrite what the file says (ft:139, 196-198). Its epochs have none.

Departures. Its clean images are drawn class by class (ft:431), ours as everybody's here. The recorded loss is that at w
+ e, without the entropy of the smoothed label, a constant. A step in a CUDA graph could not change its rate, so `graph`
has no effect with `annealed`. As in the official code the last epoch is kept. Images are in [0, 1]; normalisation is a
matter of the model. The paper's text was not readable to us.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from defenses import ft
from reproduce.defending import Clean, Defended
from reproduce.errors import UserError
from reproduce.training import Cosine, Loss, Observer, Recipe, sgd, silent, single_sgd, train

EPSILON = 1e-12     # sam:7, added to the norm

# yaml:13-22 name the values of FMP's baselines; the cosine is not the recipe's here.
RELEASED = replace(ft.BENCH, cosine=None)


@dataclass(frozen=True)
class Config:
    """annealed: steps in which the rate falls from the recipe's to 0, and again rises; None: it is the recipe's."""

    rho: float = 2.0                    # yaml:29-30
    smoothing: float = 0.1              # s; yaml:31
    annealed: int | None = 100          # train_settings_generate.py:67, ft:302
    recipe: Recipe = RELEASED

    def __post_init__(self) -> None:
        # Beyond one half the label of two classes would be the other one.
        if self.rho < 0 or not 0 <= self.smoothing <= 0.5:
            raise UserError("FT-SAM needs rho >= 0 and a smoothing in [0, 0.5], not "
                            f"rho={self.rho}, smoothing={self.smoothing}")
        if self.annealed is not None and (self.annealed < 1 or self.recipe.cosine or len(self.recipe.rates) > 1):
            raise UserError("FT-SAM anneals from step to step (annealed >= 1) or as its recipe says, not both")


SETTINGS = {
    ("ft_sam", "released"): Config(),
    ("ft_sam", "released-gtsrb"): Config(recipe=replace(RELEASED, epochs=50)),      # gtsrb.yaml:13
    ("ft_sam", "described"): Config(annealed=None, recipe=ft.BENCH),
}


def requires(config: Config) -> frozenset[str]:
    """Nothing but the clean images."""
    return frozenset()


def work(config: Config, images: int, classes: int) -> float:
    """The second pass of every step."""
    return config.recipe.epochs * images


def defend(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent,
           clean_model: nn.Module | None = None) -> Defended:
    """A copy of `model` fine-tuned on the clean images, all of its layers."""
    tuned, recipe, optimizers = deepcopy(model).requires_grad_(True), config.recipe, single_sgd
    if config.annealed is not None:
        recipe, optimizers = replace(recipe, graph=False), partial(annealed_sgd, steps=config.annealed)
    train(tuned, clean.images, clean.labels, recipe, seed, phase="sharpness",
          loss=partial(sharpness, rho=config.rho, smoothing=config.smoothing), observe=observe, optimizers=optimizers)
    return Defended(tuned)


def sharpness(model: nn.Module, images: Tensor, labels: Tensor, rho: float, smoothing: float) -> Loss:
    """L at w + e, whose gradient in e is cut off: that in the model's own weights is the one to descend."""
    logits = model(images)
    here = smooth_cross_entropy(logits, labels, smoothing)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    away = perturbation(list(weights.values()), here, rho)
    # On copies of the running statistics, so that this pass leaves no trace in them.
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state |= {name: weight + e for (name, weight), e in zip(weights.items(), away, strict=True)}
    total = smooth_cross_entropy(functional_call(model, state, (images,)), labels, smoothing)
    return Loss(total, logits, {"ce": here.detach()})


def perturbation(weights: list[Tensor], loss: Tensor, rho: float) -> list[Tensor]:
    """e, one tensor for each of `weights`, from the gradient of `loss`, ()."""
    gradients = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(weight.abs() * g) for weight, g in zip(weights, gradients, strict=True)]
        scale = rho / (torch.linalg.vector_norm(torch.stack(norms)) + EPSILON)
        return [weight.square() * g * scale for weight, g in zip(weights, gradients, strict=True)]


def smooth_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy () with labels of 1 - s and s / (K - 1). logits: (N, K); labels: (N,)."""
    # torch spreads its share evenly over all K classes, the labelled one among them.
    classes = logits.shape[1]
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing * classes / (classes - 1))


def annealed_sgd(model: nn.Module, recipe: Recipe, steps: int) -> list[torch.optim.Optimizer]:
    """One SGD whose rate follows the cosine of half period `steps` from one of its steps to the next."""
    optimizer, cosine, taken = sgd(model.parameters(), recipe), Cosine(steps), count()

    def advance(optimizer: torch.optim.Optimizer, _arguments: Any, _options: Any) -> None:
        rate = cosine.rate(recipe.rate(0), next(taken))
        for group in optimizer.param_groups:
            group["lr"] = rate

    optimizer.register_step_pre_hook(advance)
    return [optimizer]
