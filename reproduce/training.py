"""The one training loop, used for victims, teachers, fine-tuning and every other gradient descent on images.

Order and augmentation of epoch e depend on (seed, phase, e) only, so an interrupted training resumes at an epoch
from the model and the momentum alone and ends bit for bit where the undisturbed one ends (on a CPU).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.data.augment import Augment, apply, draw, take, to_input
from reproduce.rng import generator


@dataclass(frozen=True)
class Recipe:
    """How to train. `rates` lists (first epoch, learning rate), epochs counted from 0.

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

    def rate(self, epoch: int) -> float:
        """Learning rate in force at `epoch`."""
        return [rate for first, rate in self.rates if first <= epoch][-1]


@dataclass
class Loss:
    """total: () to descend; logits: (N, K); terms: named parts worth recording, each ()."""

    total: Tensor
    logits: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


LossFunction = Callable[[nn.Module, Tensor, Tensor], Loss]


class Observer(Protocol):
    """Hears about every finished epoch: phase ("victim", "teacher", ...), 1-based epoch, how many, model, numbers."""

    def __call__(self, phase: str, epoch: int, epochs: int, model: nn.Module, row: dict[str, float]) -> None: ...


def silent(phase: str, epoch: int, epochs: int, model: nn.Module, row: dict[str, float]) -> None:
    """The observer that does nothing."""


class Checkpoint(Protocol):
    """Where a long training keeps its last finished epoch. Both calls may do nothing."""

    def load(self) -> tuple[int, dict[str, Tensor], list[dict[str, float]]] | None: ...

    def save(self, epoch: int, tensors: dict[str, Tensor], history: list[dict[str, float]]) -> None: ...


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Loss:
    """Plain classification loss."""
    logits = model(images)
    return Loss(F.cross_entropy(logits.float(), labels), logits)


def train(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, seed: int, *, phase: str,
          loss: LossFunction = cross_entropy, observe: Observer = silent, checkpoint: Checkpoint | None = None,
          project: Callable[[nn.Module], None] | None = None) -> list[dict[str, float]]:
    """Train `model` in place by SGD and leave it in eval mode; return one row of numbers per epoch.

    images: uint8 (N, 3, H, W) and labels: int64 (N,), both on the model's device.
    phase names the random streams: two trainings of one run need different phases.
    project, if given, is applied to the model after every step (to keep pruned weights at zero, say).
    """
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=recipe.rate(0),
                                momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov)
    history: list[dict[str, float]] = []
    saved = checkpoint.load() if checkpoint else None
    if saved:
        _restore(model, optimizer, saved[1])
        history = saved[2]
    step = _Step(model, optimizer, loss, recipe, images, labels, project)
    for epoch in range(len(history), recipe.epochs):
        step.set_rate(recipe.rate(epoch))
        history.append({"epoch": epoch + 1, "rate": recipe.rate(epoch), **_epoch(step, recipe, seed, phase, epoch)})
        if checkpoint:
            checkpoint.save(epoch + 1, _tensors(model, optimizer), history)
        model.eval()
        observe(phase, epoch + 1, recipe.epochs, model, history[-1])
    model.eval()
    return history


def _epoch(step: "_Step", recipe: Recipe, seed: int, phase: str, epoch: int) -> dict[str, float]:
    """One pass over the data: mean loss terms and training accuracy (percent)."""
    step.model.train()
    count, size = len(step.images), step.images.shape[-1]
    device = step.images.device
    rng = generator(seed, "order", phase, epoch)
    order = torch.randperm(count, generator=rng) if recipe.shuffle else torch.arange(count)
    sums: dict[str, Tensor] = {}
    for start in range(0, count, recipe.batch):
        index = order[start:start + recipe.batch]
        parameters = draw(len(index), size, recipe.augment, rng) if recipe.augment.active else None
        result = step(index.to(device), None if parameters is None else parameters.to(device))
        for name, value in result.items():
            sums[name] = sums.get(name, 0) + value * len(index)
    row = {name: float(value) / count for name, value in sums.items()}
    row["train_acc"] = 100 * row.pop("correct")
    return row


class _Step:
    """One optimisation step on the images at `index`: eager, or replayed from a CUDA graph."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: LossFunction, recipe: Recipe,
                 images: Tensor, labels: Tensor, project: Callable[[nn.Module], None] | None) -> None:
        self.model, self.optimizer, self.loss, self.recipe = model, optimizer, loss, recipe
        # Channels-last storage makes gathering a batch and feeding it to a convolution copy-free.
        self.images, self.labels = images.contiguous(memory_format=torch.channels_last), labels
        self.project = project
        self.captured: _Captured | None = None

    def set_rate(self, rate: float) -> None:
        group = self.optimizer.param_groups[0]
        if rate != group["lr"]:
            group["lr"] = rate
            self.captured = None  # the rate is a constant of the captured graph

    def __call__(self, index: Tensor, parameters: Tensor | None) -> dict[str, Tensor]:
        if not (self.recipe.graph and index.is_cuda and len(index) == self.recipe.batch):
            return self.eager(index, parameters)
        # The first step of a stretch runs eagerly: it makes the momentum buffers that the graph then updates in place.
        if self.captured is None:
            result = self.eager(index, parameters)
            self.captured = _Captured(self, index, parameters)
            return result
        return self.captured.replay(index, parameters)

    def eager(self, index: Tensor, parameters: Tensor | None) -> dict[str, Tensor]:
        batch, labels = take(self.images, index), self.labels[index]
        if parameters is not None:
            batch = apply(batch, parameters, self.recipe.augment)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            result = self.loss(self.model, to_input(batch), labels)
        self.optimizer.zero_grad()
        result.total.backward()
        self.optimizer.step()
        if self.project:
            self.project(self.model)
        correct = (result.logits.argmax(1) == labels).float().mean()
        return {"loss": result.total.detach(), "correct": correct,
                **{name: value.detach() for name, value in result.terms.items()}}


class _Captured:
    """A whole step recorded once and replayed with new indices and augmentation parameters."""

    def __init__(self, step: _Step, index: Tensor, parameters: Tensor | None) -> None:
        self.index = index.clone()
        self.parameters = None if parameters is None else parameters.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = step.eager(self.index, self.parameters)

    def replay(self, index: Tensor, parameters: Tensor | None) -> dict[str, Tensor]:
        self.index.copy_(index)
        if parameters is not None:
            self.parameters.copy_(parameters)
        self.graph.replay()
        return {name: value.clone() for name, value in self.result.items()}


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a resumed training needs, by flat name."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                state[f"momentum.{i}"] = buffer
    return state


def _restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        if name.startswith("momentum."):
            target = parameters[int(name[9:])]
            buffer = torch.empty_like(target)
            optimizer.state[target]["momentum_buffer"] = buffer.copy_(value)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch: int | None = None, precision: str = "fp32") -> Tensor:
    """Predicted labels, int64 (N,) on the CPU, for uint8 images (N, 3, H, W). The model must be in eval mode.

    batch defaults to 256 on a CPU (larger ones thrash the allocator) and 4096 on a GPU.
    """
    device: Any = next(model.parameters()).device
    batch = batch or (256 if device.type == "cpu" else 4096)
    parts = []
    for chunk in images.split(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts.append(model(to_input(chunk.to(device))).argmax(1).cpu())
    return torch.cat(parts)
