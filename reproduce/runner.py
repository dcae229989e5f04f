"""Turns a victim or a cell into its run folder: poison, train, defend, predict, record."""

import hashlib
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reproduce import data, models
from reproduce.cells import NONE, Cell, Task, Victim
from reproduce.data import Dataset
from reproduce.data.augment import take
from reproduce.data.auxiliary import pictures, released_array
from reproduce.defending import clean_subset, defense_module
from reproduce.errors import UserError
from reproduce.evaluation import TestSet, evaluate, samples
from reproduce.metrics import metrics
from reproduce.models.checkpoints import load_checkpoint
from reproduce.poisoning import Context, attack_module, triggered_candidates, triggered_labels
from reproduce.store import Run, Store
from reproduce.training import train

PROJECT = Path(__file__).resolve().parent.parent
EMBEDDED = "digits"


@dataclass
class Runner:
    """Computes tasks on one device. `progress` hears (task name, share done in [0, 1], what it is doing)."""

    store: Store
    root: Path
    device: torch.device
    progress: Callable[[str, float, str], None] = lambda name, share, doing: None
    note: Callable[[str], None] = print
    _victims: dict[str, tuple[nn.Module, TestSet]] = field(default_factory=dict)

    def run(self, task: Task) -> Run:
        """The finished run of `task`, computed if it is not there; what it needs is computed first."""
        run = self.store.find(task.name)
        if run:
            return run
        with self.store.lock(task.name):
            run = self.store.find(task.name)
            if run:
                return run
            reason = self.store.set_aside(task.name)
            if reason:
                self.note(f"{task.name}: {reason}; set aside and computed again")
            try:
                if isinstance(task, Cell):
                    return self._cell(task)
                return self._published(task) if task.published else self._victim(task)
            except Exception:
                self.store.fail(task.name, traceback.format_exc())
                raise

    def _victim(self, victim: Victim) -> Run:
        started = time.perf_counter()
        dataset = data.load(victim.dataset, self.root)
        attack = None if victim.attack == NONE else attack_module(victim.attack)
        state = self._prepare(victim, dataset) if attack else {}
        images, labels = dataset.train_images, dataset.train_labels
        info: dict[str, Any] = {}
        if hasattr(attack, "poison"):
            poisoned = attack.poison(images, labels, victim.settings, state, victim.seed, dataset.num_classes)
            images, labels = poisoned.images, poisoned.labels
            info["poisoned"] = int(poisoned.mask.sum())
        images, labels = images.to(self.device), labels.to(self.device)
        model = models.build(victim.model, dataset.num_classes, victim.seed).to(self.device)
        checkpoint = self.store.progress(victim.name)
        resumed = checkpoint.load()
        if resumed:
            info["resumed_after_epoch"] = resumed[0]

        def observe(phase: str, epoch: int, epochs: int, _model: nn.Module, _row: dict[str, float]) -> None:
            self.progress(victim.name, epoch / epochs, f"{phase} epoch {epoch}/{epochs}")

        if hasattr(attack, "implant"):
            history, state = attack.implant(model, images, labels, victim.settings, state, victim.recipe, victim.seed,
                                            dataset.num_classes, observe, checkpoint)
        else:
            history = train(model, images, labels, victim.recipe, victim.seed, phase="victim", observe=observe,
                            checkpoint=checkpoint)
        test = test_set(dataset, victim, state)
        return self._write(victim, model, test, [{"phase": "victim", **row} for row in history], info, started,
                           {"trigger": state} if state else {})

    def _published(self, victim: Victim) -> Run:
        started = time.perf_counter()
        dataset, path = data.load(victim.dataset, self.root), self.root / victim.published.file
        if not path.is_file():
            raise UserError(f"{path} is missing: put {victim.published.source} there")
        if hashlib.sha256(path.read_bytes()).hexdigest() != victim.published.sha256:
            raise UserError(f"{path} is not {victim.published.source}: its SHA-256 differs")
        model = load_checkpoint(path, victim.model, dataset.num_classes).to(self.device)
        state = self._prepare(victim, dataset)
        return self._write(victim, model, test_set(dataset, victim, state), [], {"source": victim.published.source},
                           started, {"trigger": state} if state else {})

    def _cell(self, cell: Cell) -> Run:
        victim_model, test = self._load_victim(cell.victim)
        clean_model = self._load_victim(cell.victim.clean())[0] if len(cell.needs()) > 1 else None
        dataset = data.load(cell.victim.dataset, self.root)
        clean = clean_subset(dataset.train_images.to(self.device), dataset.train_labels.to(self.device),
                             cell.clean_fraction, cell.seed, dataset.num_classes)
        history: list[dict[str, Any]] = []
        if cell.curve:
            history.append({"phase": "before", "epoch": 0, **metrics(evaluate(victim_model, test))})

        def observe(phase: str, epoch: int, epochs: int, model: nn.Module, row: dict[str, float]) -> None:
            measured = metrics(evaluate(model, test)) if cell.curve else {}
            history.append({"phase": phase, **row, **measured})
            self.progress(cell.name, epoch / epochs, f"{phase} epoch {epoch}/{epochs}")

        started = time.perf_counter()
        with images_counted(victim_model) as seen:
            defended = defense_module(cell.defense).defend(victim_model, clean, cell.config, cell.seed, observe,
                                                           clean_model)
        info = {**defended.info, "clean_images": len(clean.images), "images_seen": seen(defended.model),
                "values_changed": values_changed(victim_model, defended.model)}
        return self._write(cell, defended.model, test, history, info, started,
                           {"defense": defended.tensors} if defended.tensors else {})

    def _write(self, task: Task, model: nn.Module, test: TestSet, history: list[dict[str, Any]], info: dict[str, Any],
               started: float, tensors: dict[str, dict[str, Tensor]]) -> Run:
        seconds = round(time.perf_counter() - started, 2)
        self.progress(task.name, 1.0, "evaluating")
        model.eval()
        predictions = evaluate(model, test)
        return self.store.write(
            task.name, config=task.describe(), environment=environment(task, self.device),
            metrics={**metrics(predictions), "seconds": seconds, "info": info}, history=history,
            arrays={"predictions": vars(predictions), "samples": samples(model, test, model.taps)},
            tensors={"model": model.state_dict(), **tensors})

    def _load_victim(self, victim: Victim) -> tuple[nn.Module, TestSet]:
        """The victim's model and test sets, kept for the next cell on the same victim."""
        if victim.name not in self._victims:
            run = self.run(victim)
            dataset = data.load(victim.dataset, self.root)
            model = models.build(victim.model, dataset.num_classes, victim.seed)
            model.load_state_dict(run.tensors("model"))
            state = run.tensors("trigger") if (run.path / "trigger.safetensors").exists() else {}
            if len(self._victims) > 1:
                self._victims.clear()
            self._victims[victim.name] = model.to(self.device).eval(), test_set(dataset, victim, state)
        return self._victims[victim.name]

    def _prepare(self, victim: Victim, dataset: Dataset) -> dict[str, Tensor]:
        needed = attack_module(victim.attack).requires(victim.settings)
        clean_model = self._load_victim(victim.clean())[0] if "clean-model" in needed else None
        return prepare(victim.attack, victim.settings, dataset, victim.seed, self.root, clean_model,
                       lambda share: self.progress(victim.name, 0.0, f"preparing the trigger {share:.0%}"))


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


def environment(task: Task, device: torch.device) -> dict[str, Any]:
    """Versions, hardware, commit, and a hash of the source that made the run."""
    return {**_machine(), "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(), "source": source_hash(task),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def source_hash(task: Task) -> str:
    """SHA-256 over the files a run's numbers depend on most: its attack, its defense, training, model."""
    victim = task.victim if isinstance(task, Cell) else task
    files = [PROJECT / "reproduce" / name for name in ("training.py", "poisoning.py", "defending.py", "rng.py",
                                                       "data/augment.py")]
    files.append(models.source(victim.model))
    if victim.attack != NONE:
        files.append(PROJECT / "attacks" / f"{victim.attack}.py")
    if isinstance(task, Cell):
        files.append(PROJECT / "defenses" / f"{task.defense}.py")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


@lru_cache(maxsize=1)
def _machine() -> dict[str, Any]:
    import numpy
    import torchvision
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": numpy.__version__, "platform": platform.platform(), "cpu": _cpu(), "cores": os.cpu_count(),
            "commit": _commit()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    """The project's commit, with "+" where tracked files differ from it; None outside a git checkout."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
