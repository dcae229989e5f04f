"""The one training loop, used for victims, teachers, fine-tuning and every other gradient descent on images.

Order, augmentation and dropout of epoch e depend on (seed, phase, e) only, so an interrupted training resumes at an
epoch from the model and the optimisers' state alone and ends bit for bit where the undisturbed one ends (on a CPU).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.data.augment import Augment, apply, draw, take, to_input
from reproduce.errors import UserError
from reproduce.models import check_outputs
from reproduce.rng import derive, generator


@dataclass(frozen=True)
class Cosine:
    """Cosine annealing of the first rate down to `floor` over `epochs`, as torch's CosineAnnealingLR does it."""

    epochs: int
    floor: float = 0.0

    def rate(self, first: float, epoch: int) -> float:
        """Learning rate in force at `epoch`."""
        return self.floor + (first - self.floor) * (1 + math.cos(math.pi * epoch / self.epochs)) / 2


@dataclass(frozen=True)
class Recipe:
    """How to train. `rates` lists (first epoch, learning rate), epochs counted from 0; with `cosine` it has one entry,
    which is annealed.

    precision: "fp32", or "bf16" for autocast (on a CPU and on a GPU).
    graph: capture the whole step, augmentation included, in a CUDA graph; ignored where there is no GPU.
    """

    epochs: int
    rates: tuple[tuple[int, float], ...]
    batch: int = 64
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    shuffle: bool = True
    augment: Augment = Augment()
    precision: str = "fp32"
    graph: bool = field(default=False, metadata={"identity": False})
    cosine: Cosine | None = field(default=None, metadata={"since": "fmp"})

    def rate(self, epoch: int) -> float:
        """Learning rate in force at `epoch`."""
        if self.cosine:
            return self.cosine.rate(self.rates[0][1], epoch)
        return [rate for first, rate in self.rates if first <= epoch][-1]


def sgd(parameters: Iterable[nn.Parameter], recipe: Recipe) -> torch.optim.SGD:
    """The recipe's optimiser, for those parameters that are to be trained."""
    return torch.optim.SGD((p for p in parameters if p.requires_grad), lr=recipe.rate(0), momentum=recipe.momentum,
                           weight_decay=recipe.weight_decay, nesterov=recipe.nesterov)


def single_sgd(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """One SGD for the whole model."""
    return [sgd(model.parameters(), recipe)]


@dataclass
class Loss:
    """total: () to descend; terms: named parts worth recording, each ().

    logits: (N, K), or None where nothing is classified; labels: (N,), those the logits were trained towards if they
    are not the batch's own. Both are for the training accuracy only.
    """

    total: Tensor
    logits: Tensor | None
    terms: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None


# (model, images float (N, 3, H, W), labels (N,)) -> Loss, and a fourth argument where `train` is given `extra`.
LossFunction = Callable[..., Loss]
Optimizers = Callable[[nn.Module, Recipe], list[torch.optim.Optimizer]]


class Observer(Protocol):
    """Hears about every finished epoch: phase ("victim", "teacher", ...), 1-based epoch, how many, model, numbers."""

    def __call__(self, phase: str, epoch: int, epochs: int, model: nn.Module, row: dict[str, float]) -> None: ...


def silent(phase: str, epoch: int, epochs: int, model: nn.Module, row: dict[str, float]) -> None:
    """The observer that does nothing."""


class Checkpoint(Protocol):
    """Where a long training keeps its last finished epoch. Both calls may do nothing."""

    def load(self) -> tuple[int, dict[str, Tensor], list[dict[str, float]]] | None: ...

    def save(self, epoch: int, tensors: dict[str, Tensor], history: list[dict[str, float]]) -> None: ...


@dataclass
class Continued:
    """A checkpoint shared with an earlier training of the same run, whose rows `before` precede this one's."""

    checkpoint: Checkpoint
    before: list[dict[str, float]]

    def load(self) -> tuple[int, dict[str, Tensor], list[dict[str, float]]] | None:
        saved = self.checkpoint.load()
        count = len(self.before)
        return (saved[0] - count, saved[1], saved[2][count:]) if saved and len(saved[2]) > count else None

    def save(self, epoch: int, tensors: dict[str, Tensor], history: list[dict[str, float]]) -> None:
        self.checkpoint.save(len(self.before) + epoch, tensors, self.before + history)


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
    """Plain classification loss."""
    logits = model(images)
    return Loss(F.cross_entropy(logits.float(), labels), logits)


def train(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, seed: int, *, phase: str,
          loss: LossFunction = cross_entropy, observe: Observer = silent, checkpoint: Checkpoint | None = None,
          project: Callable[[nn.Module], None] | None = None,
          extra: Callable[[int, torch.Generator], Tensor] | None = None,
          optimizers: Optimizers = single_sgd,
          until: Callable[[dict[str, float]], bool] | None = None) -> list[dict[str, float]]:
    """Train `model` in place by SGD and leave it in eval mode; return one row of numbers per epoch.

    images: uint8 (N, 3, H, W) and labels: int64 (N,), both on the model's device.
    phase names the random streams: two trainings of one run need different phases.
    project, if given, is applied to the model after every step (to keep pruned weights at zero, say).
    extra, if given, draws a random tensor for each batch from (batch size, generator), which `loss` receives as its
    fourth argument. The generator is the epoch's own, so the other streams are the same with and without it.
    optimizers makes what descends. The first one's rate is the recipe's; the others start at the rate they are made
    with and fall when the recipe's falls, by the same factor.
    until, if given, ends the training after the first epoch of whose row it is true.
    Raises UserError when a loss is no number any more: what such a model predicts is class 0 for every image, which as
    a target label would look like a backdoor.
    """
    descending = optimizers(model, recipe)
    history: list[dict[str, float]] = []
    saved = checkpoint.load() if checkpoint else None
    if saved:
        restore(model, descending, saved[1])
        history = saved[2]
    step = _Step(model, descending, loss, recipe, images, labels, project)
    for epoch in range(len(history), recipe.epochs):
        if until and history and until(history[-1]):
            break
        step.set_rate(recipe.rate(epoch))
        with own_dropout(model, images.device, derive(seed, "dropout", phase, epoch)):
            numbers = _epoch(step, recipe, seed, phase, epoch, extra)
        check_finite(numbers, phase, epoch + 1)
        history.append({"epoch": epoch + 1, "rate": recipe.rate(epoch), **numbers})
        if checkpoint:
            checkpoint.save(epoch + 1, flat_state(model, descending), history)
        model.eval()
        observe(phase, epoch + 1, recipe.epochs, model, history[-1])
    model.eval()
    return history


def check_finite(row: dict[str, float], phase: str, epoch: int) -> None:
    """Raise UserError if a number of an epoch's row is none."""
    lost = [name for name, value in row.items() if not math.isfinite(value)]
    if lost:
        raise UserError(f"training diverged: {lost[0]} is {row[lost[0]]} in epoch {epoch} of {phase!r}; these settings "
                        "are too strong for this model and data, choose others")


@contextmanager
def own_dropout(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Masks of this seed, for dropout draws from the global generators; a model without dropout draws nothing."""
    if not any(isinstance(module, nn.Dropout) for module in model.modules()):
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _epoch(step: "_Step", recipe: Recipe, seed: int, phase: str, epoch: int,
           extra: Callable[[int, torch.Generator], Tensor] | None) -> dict[str, float]:
    """One pass over the data: mean loss terms and training accuracy (percent)."""
    step.model.train()
    count, size = len(step.images), step.images.shape[-1]
    device = step.images.device
    rng = generator(seed, "order", phase, epoch)
    order = torch.randperm(count, generator=rng) if recipe.shuffle else torch.arange(count)
    extra_rng = generator(seed, "extra", phase, epoch)
    # At once for the whole epoch: a copy to a GPU waits for all that was started there.
    parameters = torch.cat([draw(len(index), size, recipe.augment, rng) for index in order.split(recipe.batch)]
                           ).to(device) if recipe.augment.active else None
    order = order.to(device)
    sums: dict[str, Tensor] = {}
    for start in range(0, count, recipe.batch):
        index = order[start:start + recipe.batch]
        drawn = extra(len(index), extra_rng).to(device) if extra else None
        result = step(index, None if parameters is None else parameters[start:start + recipe.batch], drawn)
        for name, value in result.items():
            sums[name] = sums.get(name, 0) + value * len(index)
    row = {name: float(value) / count for name, value in sums.items()}
    if "correct" in row:
        row["train_acc"] = 100 * row.pop("correct")
    return row


class _Step:
    """One optimisation step on the images at `index`: eager, or replayed from a CUDA graph."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: LossFunction, recipe: Recipe,
                 images: Tensor, labels: Tensor, project: Callable[[nn.Module], None] | None) -> None:
        self.model, self.optimizers, self.loss, self.recipe = model, optimizers, loss, recipe
        # Channels-last storage makes gathering a batch and feeding it to a convolution copy-free.
        self.images, self.labels = images.contiguous(memory_format=torch.channels_last), labels
        self.project = project
        self.first_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.captured: _Captured | None = None

    def set_rate(self, rate: float) -> None:
        if rate == self.optimizers[0].param_groups[0]["lr"]:
            return
        for i, (optimizer, first) in enumerate(zip(self.optimizers, self.first_rates, strict=True)):
            for group, first_rate in zip(optimizer.param_groups, first, strict=True):
                group["lr"] = rate if i == 0 else first_rate * (rate / self.recipe.rate(0))
        self.captured = None  # the rate is a constant of the captured graph

    def __call__(self, index: Tensor, parameters: Tensor | None, extra: Tensor | None) -> dict[str, Tensor]:
        if not (self.recipe.graph and index.is_cuda and len(index) == self.recipe.batch):
            return self.eager(index, parameters, extra)
        # The first step of a stretch runs eagerly: it makes the optimisers' buffers that the graph updates in place.
        if self.captured is None:
            result = self.eager(index, parameters, extra)
            self.captured = _Captured(self, index, parameters, extra)
            return result
        if not self.captured.fits(index, parameters, extra):  # batches may draw tensors of different lengths
            return self.eager(index, parameters, extra)
        return self.captured.replay(index, parameters, extra)

    def eager(self, index: Tensor, parameters: Tensor | None, extra: Tensor | None) -> dict[str, Tensor]:
        batch, labels = take(self.images, index), self.labels[index]
        if parameters is not None:
            batch = apply(batch, parameters, self.recipe.augment)
        drawn = () if extra is None else (extra,)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            result = self.loss(self.model, to_input(batch), labels, *drawn)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        result.total.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.project:
            self.project(self.model)
        numbers = {"loss": result.total.detach(), **{name: value.detach() for name, value in result.terms.items()}}
        if result.logits is not None:
            wanted = labels if result.labels is None else result.labels
            numbers["correct"] = (result.logits.argmax(1) == wanted).float().mean()
        return numbers


class _Captured:
    """A whole step recorded once and replayed with new indices, augmentation parameters and extra draws."""

    def __init__(self, step: _Step, *inputs: Tensor | None) -> None:
        self.inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = step.eager(*self.inputs)

    def fits(self, *inputs: Tensor | None) -> bool:
        """Whether these inputs have the shapes that were recorded."""
        return all(new is None or new.shape == ours.shape for ours, new in zip(self.inputs, inputs, strict=True))

    def replay(self, *inputs: Tensor | None) -> dict[str, Tensor]:
        for ours, new in zip(self.inputs, inputs, strict=True):
            if new is not None:
                ours.copy_(new)
        self.graph.replay()
        return {name: value.clone() for name, value in self.result.items()}


def flat_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything a resumed training needs, by flat name: model.<name>, optimizer.<which>.<parameter>.<name>."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    for which, optimizer in enumerate(optimizers):
        for i, values in optimizer.state_dict()["state"].items():
            state.update({f"optimizer.{which}.{i}.{name}": value for name, value in values.items()
                          if isinstance(value, Tensor)})
    return state


def restore(model: nn.Module, optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    states: list[dict[int, dict[str, Tensor]]] = [defaultdict(dict) for _ in optimizers]
    parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    for name, value in tensors.items():
        if name.startswith("model."):
            continue
        _, which, i, kind = name.split(".")
        target = parameters[int(which)][int(i)]
        if value.shape == target.shape:  # in the parameter's own memory layout
            value = torch.empty_like(target).copy_(value)
        states[int(which)][int(i)][kind] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch: int | None = None, precision: str = "fp32") -> Tensor:
    """Predicted labels, int64 (N,) on the CPU, for uint8 images (N, 3, H, W). The model must be in eval mode.

    batch defaults to 256 on a CPU (larger ones thrash the allocator) and 4096 on a GPU. Raises UserError for a model
    whose outputs are not numbers, of which the largest would be the first.
    """
    device: Any = next(model.parameters()).device
    batch = batch or (256 if device.type == "cpu" else 4096)
    parts = []
    for chunk in images.split(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(to_input(chunk.to(device)))
        check_outputs(logits)
        parts.append(logits.argmax(1).cpu())
    return torch.cat(parts)
