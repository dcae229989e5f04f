"""The image bench: poison, train, defend, predict and measure a victim or a cell of images."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reproduce import data, models
from reproduce.bench import Outcome, Surroundings
from reproduce.cells import NONE, Cell, Task, Victim, recipes
from reproduce.data import Dataset
from reproduce.data.augment import take
from reproduce.data.auxiliary import pictures, released_array
from reproduce.defending import clean_subset, defense_module
from reproduce.errors import UserError
from reproduce.evaluation import TestSet, evaluate, map_changes, samples
from reproduce.metrics import metrics
from reproduce.models.checkpoints import load_checkpoint
from reproduce.poisoning import Context, attack_module, triggered_candidates, triggered_labels
from reproduce.store import digest
from reproduce.training import train

EMBEDDED = "digits"
BACKWARD_COST = 3.0
TRAIN_IMAGES = {"digits": 1438, "cifar10": 50_000, "cifar100": 50_000, "gtsrb": 39_209, "tiny-imagenet": 100_000}
TEST_IMAGES = {"digits": 359, "cifar10": 10_000, "cifar100": 10_000, "gtsrb": 12_630, "tiny-imagenet": 10_000}
SIDES = {"tiny-imagenet": 64}   # in pixels; 32 elsewhere


class ImageBench:
    """Computes on one device; keeps the last victims for the next cells on them."""

    def __init__(self, at: Surroundings) -> None:
        self.at = at
        self._victims: dict[str, tuple[nn.Module, TestSet]] = {}

    @staticmethod
    def cost(task: Task) -> float:
        """Work of a task in forward passes of one image through WRN-16-1; used for ordering and time estimates only."""
        each = models.size(task.victim.model, SIDES.get(task.victim.dataset, 32))
        total, test = TRAIN_IMAGES[task.victim.dataset], 2 * TEST_IMAGES[task.victim.dataset]
        if isinstance(task, Cell):
            epochs = sum(recipe.epochs for recipe in recipes(task.config))
            clean = round(task.clean_fraction * total)
            module = defense_module(task.defense)
            own = getattr(module, "trained", lambda config, images: epochs * images)
            work = getattr(module, "work", lambda config, images, classes: 0)
            trained = own(task.config, clean) + work(task.config, clean, data.NUM_CLASSES[task.victim.dataset])
            return each * ((BACKWARD_COST + 1) * trained + test * (1 + epochs * task.curve))
        if not task.victim.poisoned:
            return each * test
        work = getattr(attack_module(task.attack), "work", None) if task.attack != NONE else None
        trained = sum(recipe.epochs for recipe in recipes(task.recipe)) * total
        own = (BACKWARD_COST + 1) * work(task.settings, total) if work else 0.0
        return each * (BACKWARD_COST * trained + test) + own

    @staticmethod
    def check(victims: list[Victim], root: Path) -> None:
        """Load each data set once, so that a missing file is one line."""
        for name in sorted({victim.dataset for victim in victims}):
            data.load(name, root)

    def victim(self, victim: Victim) -> Outcome:
        if victim.published:
            return self._published(victim)
        started = time.perf_counter()
        if not victim.poisoned:     # its weights are in the clean model's run
            model, test = self._load_victim(victim)
            return replace(self._outcome(victim, model, test, [], {}, started, {}), tensors={})
        dataset = data.load(victim.dataset, self.at.root)
        attack = None if victim.attack == NONE else attack_module(victim.attack)
        state = self._prepare(victim, dataset) if attack else {}
        images, labels = dataset.train_images, dataset.train_labels
        info: dict[str, Any] = {}
        if hasattr(attack, "poison"):
            poisoned = attack.poison(images, labels, victim.settings, state, victim.seed, dataset.num_classes)
            images, labels = poisoned.images, poisoned.labels
            info["poisoned"] = int(poisoned.mask.sum())
        images, labels = images.to(self.at.device), labels.to(self.at.device)
        model = models.build(victim.model, dataset.num_classes, victim.seed, victim.dataset).to(self.at.device)
        # Where the trigger comes out otherwise, on another device say, a training with the former one begins anew.
        checkpoint = self.at.store.progress(victim.name, digest(state))
        resumed = checkpoint.load()
        if resumed:
            info["resumed_after_epoch"] = resumed[0]

        def observe(phase: str, epoch: int, epochs: int, _model: nn.Module, _row: dict[str, float]) -> None:
            self.at.progress(victim.name, epoch / epochs, f"{phase} epoch {epoch}/{epochs}")

        if hasattr(attack, "implant"):
            history, state = attack.implant(model, images, labels, victim.settings, state, victim.recipe, victim.seed,
                                            dataset.num_classes, observe, checkpoint)
        else:
            history = train(model, images, labels, victim.recipe, victim.seed, phase="victim", observe=observe,
                            checkpoint=checkpoint)
        test = test_set(dataset, victim, state)
        return self._outcome(victim, model, test, [{"phase": "victim", **row} for row in history], info, started,
                           {"trigger": state} if state else {})

    def _published(self, victim: Victim) -> Outcome:
        started = time.perf_counter()
        dataset, path = data.load(victim.dataset, self.at.root), self.at.root / victim.published.file
        if not path.is_file():
            raise UserError(f"{path} is missing: put {victim.published.source} there")
        if hashlib.sha256(path.read_bytes()).hexdigest() != victim.published.sha256:
            raise UserError(f"{path} is not {victim.published.source}: its SHA-256 differs")
        model = as_published(load_checkpoint(path, victim.model, dataset.num_classes, victim.dataset), victim)
        state = self._prepare(victim, dataset)
        return self._outcome(victim, model.to(self.at.device), test_set(dataset, victim, state), [],
                           {"source": victim.published.source}, started, {"trigger": state} if state else {})

    def cell(self, cell: Cell) -> Outcome:
        victim_model, test = self._load_victim(cell.victim)
        clean_model = self._load_victim(cell.victim.clean())[0] if cell.needs_clean_model() else None
        dataset = data.load(cell.victim.dataset, self.at.root)
        clean = clean_subset(dataset.train_images.to(self.at.device), dataset.train_labels.to(self.at.device),
                             cell.clean_fraction, cell.seed, dataset.num_classes)
        defense = defense_module(cell.defense)
        if "test-images" in defense.requires(cell.config):     # a reproduced leak, nothing else
            clean = replace(clean, test=dataset.test_images.to(self.at.device))
        if "test-asr" in defense.requires(cell.config):        # a row called oracle, nothing else
            clean = replace(clean, measured=lambda model: accuracy_and_asr(model, test))
        base = cell.base()
        start = {"base": self.at.run(base).tensors("defense")} if base else {}
        history: list[dict[str, Any]] = []
        if cell.curve:
            history.append({"phase": "before", "epoch": 0, **metrics(evaluate(victim_model, test))})

        def observe(phase: str, epoch: int, epochs: int, model: nn.Module, row: dict[str, float]) -> None:
            measured = metrics(evaluate(model, test)) if cell.curve else {}
            history.append({"phase": phase, **row, **measured})
            self.at.progress(cell.name, epoch / epochs, f"{phase} epoch {epoch}/{epochs}")

        started = time.perf_counter()
        with images_counted(victim_model) as seen:
            defended = defense.defend(victim_model, clean, cell.config, cell.seed, observe, clean_model, **start)
        info = {**defended.info, "clean_images": len(clean.images), "images_seen": seen(defended.model),
                "values_changed": values_changed(victim_model, defended.model)}
        return self._outcome(cell, defended.model, test, history, info, started,
                           {"defense": defended.tensors} if defended.tensors else {})

    def _outcome(self, task: Task, model: nn.Module, test: TestSet, history: list[dict[str, Any]], info: dict[str, Any],
                 started: float, tensors: dict[str, dict[str, Tensor]]) -> Outcome:
        seconds = round(time.perf_counter() - started, 2)
        self.at.progress(task.name, 1.0, "evaluating")
        model.eval()
        predictions = evaluate(model, test)
        shown = samples(model, test, model.taps)
        if isinstance(task, Victim):
            shown |= map_changes(model, test)
        return Outcome({**metrics(predictions), "seconds": seconds, "info": info}, history,
                       {"predictions": vars(predictions), "samples": shown},
                       {"model": model.state_dict(), **tensors})

    def _load_victim(self, victim: Victim) -> tuple[nn.Module, TestSet]:
        """The victim's model and test sets, kept for the next cell on the same victim."""
        if victim.name not in self._victims:
            run, trigger = (self.at.run(part) for part in (victim.parts()[0], victim.parts()[-1]))
            dataset = data.load(victim.dataset, self.at.root)
            model = models.build(victim.model, dataset.num_classes, victim.seed, victim.dataset)
            model.load_state_dict(run.tensors("model"))
            model = as_published(model, victim)
            state = trigger.tensors("trigger") if (trigger.path / "trigger.safetensors").exists() else {}
            if len(self._victims) > 1:
                self._victims.clear()
            self._victims[victim.name] = model.to(self.at.device).eval(), test_set(dataset, victim, state)
        return self._victims[victim.name]

    def _prepare(self, victim: Victim, dataset: Dataset) -> dict[str, Tensor]:
        needed = attack_module(victim.attack).requires(victim.settings)
        clean_model = self._load_victim(victim.clean())[0] if "clean-model" in needed else None
        return prepare(victim.attack, victim.settings, dataset, victim.seed, self.at.root, clean_model,
                       lambda share: self.at.progress(victim.name, 0.0, f"preparing the trigger {share:.0%}"))


def as_published(model: nn.Module, victim: Victim) -> nn.Module:
    """The victim's model, with images normalised as its authors do, where it is a published one."""
    normalised = victim.published.normalised if victim.published else None
    return models.normalise_inputs(model, normalised) if normalised else model


def accuracy_and_asr(model: nn.Module, test: TestSet) -> tuple[float, float]:
    """ACC and ASR in percent of a model in eval mode."""
    found = metrics(evaluate(model, test))
    return found["acc"], found["asr"]


@contextmanager
def images_counted(model: nn.Module) -> Iterator[Callable[[nn.Module], int]]:
    """Count the images that go through `model` and the copies made of it meanwhile, steps replayed from a graph not.

    What it gives tells the number and takes the counter off the copy it is given.
    """
    count = 0

    def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        count += len(inputs[0])

    handle = model.register_forward_pre_hook(add)

    def total(copy: nn.Module) -> int:
        copy._forward_pre_hooks.pop(handle.id, None)
        return count

    try:
        yield total
    finally:
        handle.remove()


def values_changed(before: nn.Module, after: nn.Module) -> int:
    """How many weights and statistics differ between two models of one architecture."""
    other = after.state_dict()
    return sum(int((value != other[name]).sum()) for name, value in before.state_dict().items()
               if not name.endswith("num_batches_tracked"))


def prepare(attack: str, settings: Any, dataset: Dataset, seed: int, root: Path, clean_model: nn.Module | None,
            progress: Callable[[float], None] = lambda share: None) -> dict[str, Tensor]:
    """The trigger state of an attack, with what it asks for out of the data root."""
    module = attack_module(attack)
    needed = module.requires(settings)
    found = None
    if "pictures" in needed:
        found = pictures(root, allow_samples=dataset.name == EMBEDDED)
    elif "own-images" in needed:
        found = {"train": dataset.train_images, "test": dataset.test_images}
    return module.prepare(settings, Context(
        dataset.train_images, dataset.train_labels, dataset.num_classes, seed, clean_model, found,
        (lambda name: released_array(root, name)) if "arrays" in needed else None, progress))


def test_set(dataset: Dataset, victim: Victim, state: dict[str, Tensor]) -> TestSet:
    """Clean and triggered test images of a victim."""
    return triggered_test_set(dataset.test_images, dataset.test_labels, dataset.num_classes, victim.attack,
                              victim.settings, state, victim.seed)


def triggered_test_set(images: Tensor, labels: Tensor, num_classes: int, attack: str, settings: Any,
                       state: dict[str, Tensor], seed: int) -> TestSet:
    """The clean test images and, for an attack other than "none", their triggered copies."""
    if attack == NONE:
        empty = torch.empty(0, dtype=torch.long)
        return TestSet(images, labels, empty, images[:0], empty)
    index = triggered_candidates(labels, settings)
    triggered = attack_module(attack).apply(take(images, index), settings, state, seed, "test")
    return TestSet(images, labels, index, triggered, triggered_labels(labels[index], settings, num_classes))
