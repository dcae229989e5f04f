"""MCR: Mode Connectivity Repair (Zhao et al., ICLR 2020); curve finding of Garipov et al., NeurIPS 2018.

Two models, w_0 (the victim) and w_n, are joined by a curve in weight space whose inner points, the bends, are trained
on clean images; a model from the middle of the curve keeps the accuracy and loses the backdoor.

    w(t) = sum_k binom(n, k) t^k (1 - t)^(n - k) w_k  ("bezier")   or   sum_k max(0, 1 - |n t - k|) w_k  ("polychain")
    minimise over w_1 .. w_(n-1):  E_{t ~ U(0,1)} [ CE(f_{w(t)}(x), y) + weight_decay / 2 ||w(t)||^2 ]
    repaired model: w(t) with its BatchNorm statistics measured anew on the clean images

Constants: IBM/model-sanitization@1eff7e9, backdoor/backdoor-cifar.

Second endpoint. The official script joins two backdoored models (train.py:39,43). With one victim we use a copy of it
fine-tuned on the clean images, as BackdoorBench@f02e353 does (defense/mcr.py:615-656); the fine-tuning is the FT row's.
Which t. The official evaluation reports a grid of t and chooses none; NAD's choice was not readable. Ours (`choose_t`)
looks at clean images held out from all training: of the t whose accuracy is within `tolerance` points of the best, the
one nearest 1/2, far from both endpoints.

Departures. One t per step, as official, but drawn for the whole training in advance, so that a GPU sees the same ones.
BatchNorm statistics come from the images without augmentation. NAD's settings for MCR were not readable; rates, batch
and epochs are the official defaults, and in ("nad", ...) the images come cropped and flipped as its victims' do
(data.py:23-27), each once an epoch: 16 steps of 2,000 images. Its repair (train.py:77, data.py:100-162) shows its
images without augmentation and over and over, until an epoch has 10,000 of them, 79 steps: ("mcr", "released").
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import ceil, comb
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from defenses import ft
from reproduce.data.augment import Augment, to_input
from reproduce.defending import Clean, Defended, split_validation
from reproduce.rng import generator
from reproduce.training import Loss, Observer, Recipe, predict, silent, train


def released_rates(epochs: int, rate: float) -> tuple[tuple[int, float], ...]:
    """train.py:117-125: constant for half of the training, then linear to 1 % at nine tenths, epochs from 1 there."""
    factors = [1.0 - 0.99 * min(1.0, max(0.0, (epoch / epochs - 0.5) / 0.4)) for epoch in range(1, epochs + 1)]
    changes = [e for e in range(epochs) if e == 0 or factors[e] != factors[e - 1]]
    return tuple((e, round(rate * factors[e], 8)) for e in changes)


RELEASED = Recipe(
    epochs=100, rates=released_rates(100, 0.01),            # train.py:53,57,117-125
    batch=128, momentum=0.9, nesterov=False,                # train.py:27,59,138
    weight_decay=0.0,                                       # train.py:142: the penalty on w(t) instead
    augment=Augment(crop=4, flip=True),                     # data.py:23-27
)


@dataclass(frozen=True)
class Config:
    """t: the point returned, or None to choose it on held-out clean images."""

    curve: Literal["bezier", "polychain"] = "bezier"        # train.py:35
    points: int = 3                                         # --num_bends, endpoints included; train.py:37
    weight_decay: float = 1e-4                              # train.py:61, on w(t): curves.py:319
    t: float | None = None                                  # BackdoorBench has 0.1 for PreActResNet-18
    grid: int = 11                                          # values of t; eval_curve.py:17
    tolerance: float = 4.0                                  # ours: percentage points
    validation: float = 0.2                                 # ours: share of the clean images
    # As many images an epoch, the clean ones over and over, if there are fewer; data.py:134-150
    epoch_images: int = field(default=0, metadata={"smoke": 200, "since": "MCR's own training"})
    endpoint_recipe: Recipe = ft.RELEASED                   # ours
    recipe: Recipe = RELEASED


SETTINGS = {
    ("nad", "described"): Config(endpoint_recipe=ft.DESCRIBED),
    ("nad", "released"): Config(),
    ("mcr", "released"): Config(endpoint_recipe=ft.DESCRIBED, epoch_images=10_000,
                                recipe=replace(RELEASED, augment=Augment())),
}


def requires(config: Config) -> frozenset[str]:
    """Nothing but the clean images."""
    return frozenset()


def trained(config: Config, images: int) -> int:
    """How many images go through its two trainings."""
    part = images if config.t is not None else images - round(config.validation * images)
    return config.endpoint_recipe.epochs * part + config.recipe.epochs * max(part, config.epoch_images)


def defend(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent,
           clean_model: nn.Module | None = None) -> Defended:
    """The model at one t of a curve from `model` (t = 0) to its fine-tuned copy (t = 1).

    info: t, and where it was chosen the held-out accuracy (percent) at every t of the grid.
    """
    part, held_out = (clean, None) if config.t is not None else split_validation(clean, config.validation, seed)
    endpoint = ft.fine_tune(model, part, config.endpoint_recipe, seed, phase="endpoint", observe=observe)
    shown = torch.arange(max(len(part.images), config.epoch_images), device=part.images.device) % len(part.images)
    curve = Curve(model, endpoint, config, len(shown), seed)
    train(curve, part.images[shown], part.labels[shown], config.recipe, seed, phase="curve", loss=curve_loss,
          observe=observe)
    if held_out is None:
        return Defended(curve.model_at(config.t, part.images), {"t": config.t})
    accuracies = {}
    for t in (i / (config.grid - 1) for i in range(config.grid)):
        labels = predict(curve.model_at(t, part.images), held_out.images)
        accuracies[t] = 100 * (labels == held_out.labels.cpu()).sum().item() / len(labels)
    t = choose_t(accuracies, config.tolerance)
    return Defended(curve.model_at(t, part.images), {"t": t, "validation_acc": list(accuracies.items())})


def choose_t(accuracies: dict[float, float], tolerance: float) -> float:
    """Of the t within `tolerance` points of the best accuracy, the one nearest 1/2."""
    good = [t for t, accuracy in accuracies.items() if max(accuracies.values()) - accuracy <= tolerance]
    return min(good, key=lambda t: abs(t - 0.5))


class Curve(nn.Module):
    """Fixed endpoints and trainable bends, each one flat weight vector of P values.

    Called on images alone, as by an observer, it is the model at t = 1/2 with the BatchNorm statistics gathered in
    training; `model_at` measures them anew.
    """

    def __init__(self, start: nn.Module, end: nn.Module, config: Config, images: int, seed: int) -> None:
        super().__init__()
        first, last = _flatten(start.parameters()), _flatten(end.parameters())
        n = config.points - 1
        self.kind, self.weight_decay = config.curve, config.weight_decay
        self.frame = deepcopy(start).requires_grad_(False)
        self.bends = nn.Parameter(torch.stack([torch.lerp(first, last, k / n) for k in range(1, n)]))  # curves.py:292
        steps = config.recipe.epochs * ceil(images / config.recipe.batch)
        self.register_buffer("ends", torch.stack([first, last]))
        self.register_buffer("draws", torch.rand(steps, generator=generator(seed, "curve t")).to(first.device))
        self.register_buffer("orders", torch.arange(n + 1.0, device=first.device))
        self.register_buffer("binomials", torch.tensor([float(comb(n, k)) for k in range(n + 1)], device=first.device))
        # A counter on the device, so that a resumed or a graph-captured training goes on with the right t.
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64, device=first.device))

    def weights(self, t: Tensor) -> Tensor:
        """w(t): () -> (P,), differentiable in the bends."""
        n = len(self.orders) - 1
        if self.kind == "bezier":
            coefficients = self.binomials * t.pow(self.orders) * (1 - t).pow(n - self.orders)
        else:
            coefficients = (1 - (n * t - self.orders).abs()).clamp(min=0)
        return coefficients @ torch.cat([self.ends[:1], self.bends, self.ends[1:]])

    def next_t(self) -> Tensor:
        """The next t of the training, ()."""
        t = self.draws.index_select(0, self.step)[0]
        self.step.add_(1)
        return t

    def forward(self, images: Tensor, weights: Tensor | None = None) -> Tensor:
        """Logits (N, K) of the model with these weights, by default those of the middle."""
        weights = self.weights(self.draws.new_tensor(0.5)) if weights is None else weights
        return functional_call(self.frame, _unflatten(weights, self.frame), (images,))

    @torch.no_grad()
    def model_at(self, t: float, images: Tensor) -> nn.Module:
        """A plain model of the victim's class with weights w(t), in eval mode. images: uint8, for the BatchNorms."""
        model = deepcopy(self.frame).requires_grad_(True)
        for name, value in _unflatten(self.weights(self.draws.new_tensor(t)), model).items():
            model.get_parameter(name).copy_(value)
        measure_batch_norm(model, images)
        return model.eval()


def curve_loss(curve: Curve, images: Tensor, labels: Tensor) -> Loss:
    """CE and weight penalty at one random t."""
    weights = curve.weights(curve.next_t())
    logits = curve(images, weights)
    cross_entropy = F.cross_entropy(logits.float(), labels)
    return Loss(cross_entropy + curve.weight_decay / 2 * weights.square().sum(), logits, {"ce": cross_entropy})


def measure_batch_norm(model: nn.Module, images: Tensor, batch: int = 128) -> None:
    """Replace all BatchNorm statistics of `model` by their means over the batches of `images` (utils.py:206)."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    seen = 0
    for part in images.split(batch):
        seen += len(part)
        for norm in norms:
            norm.momentum = len(part) / seen    # a first batch of momentum 1 overwrites what was there
        model(to_input(part))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _flatten(parameters: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def _unflatten(vector: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """(P,) -> the model's parameters by name."""
    named = list(model.named_parameters())
    parts = vector.split([p.numel() for _, p in named])
    return {name: part.view(p.shape) for (name, p), part in zip(named, parts, strict=True)}
