"""Run folders made of random numbers, for the tests of tables, figures, claims and the report."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from reproduce.cells import Task, Victim
from reproduce.metrics import Predictions, metrics
from reproduce.protocols import Entry
from reproduce.results import Results
from reproduce.store import Store
from reproduce.training import Recipe

CLASSES, TARGET, SAMPLES = 10, 5, 4
ATTACKS = ("BadNets", "Trojan", "Blend", "CL", "SIG", "Refool")
# (ACC, ASR) in percent that the synthetic runs scatter around.
LEVELS = {"Before": (88, 99), "FT": (85, 30), "FP": (84, 45), "MCR": (83, 20), "NAD (beta = 0)": (84, 8),
          "NAD": (84, 5)}
ROWS = [("Before", "-"), ("FT", "described"), ("FP", "described"), ("MCR", "described"),
        ("NAD (beta = 0)", "described"), ("NAD", "described"), ("FT", "released"), ("NAD (beta = 0)", "released"),
        ("NAD", "released")]


@dataclass(frozen=True)
class Stub(Task):
    """A task known by its name only."""

    title: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.title}-s{self.seed}"

    def needs(self) -> list[Task]:
        return []


class Made(Victim):
    """A victim of an attack that does not exist."""

    def needs(self) -> list[Task]:
        return []


def predictions(acc: float, asr: float, seed: int, count: int = 400) -> Predictions:
    """`count` test images of which about `acc` percent are right and about `asr` percent get the target label."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    clean = np.where(rng.random(count) < acc / 100, labels, (labels + 1) % CLASSES)
    index = np.flatnonzero(labels != TARGET)
    hit = rng.random(len(index)) < asr / 100
    # (label + 2) mod 10 is neither the label nor, for most classes, the target.
    triggered = np.where(hit, TARGET, np.where(rng.random(len(index)) < acc / 100, labels[index],
                                               (labels[index] + 2) % CLASSES))
    wanted = np.full(len(index), TARGET)
    return Predictions(*(array.astype(np.int32) for array in (labels, clean, index, wanted, triggered)))


def pictures(seed: int) -> dict[str, np.ndarray]:
    """A samples.npz: images with a white corner as trigger, attention around the middle or the trigger."""
    rng = np.random.default_rng(seed)
    grid = np.mgrid[:32, :32]
    images = rng.integers(0, 255, (SAMPLES, 3, 4, 4)).repeat(8, 2).repeat(8, 3).astype(np.uint8)
    triggered = images.copy()
    triggered[:, :, 28:31, 28:31] = 255
    arrays = {"images": images, "triggered": triggered}
    for kind, centre in (("clean", 16), ("triggered", 28)):
        hill = np.exp(-((grid - centre) ** 2).sum(0) / 60)
        for block, size in (("block1", 32), ("block2", 16), ("block3", 8)):
            step = 32 // size
            arrays[f"attention_{kind}_{block}"] = (hill[::step, ::step] + 0.1 * rng.random((SAMPLES, size, size))
                                                   ).astype(np.float16)
    arrays["feature_labels"] = (np.arange(40) % CLASSES).astype(np.int32)
    for kind in ("clean", "triggered"):
        arrays[f"features_{kind}"] = rng.random((40, 8)).astype(np.float16)
    return arrays


def write_run(store: Store, task: Task, acc: float, asr: float, seed: int, history: list[dict] | None = None,
              with_pictures: bool = True, info: dict | None = None,
              tensors: dict[str, dict[str, torch.Tensor]] | None = None,
              shown: dict[str, np.ndarray] | None = None) -> None:
    """A finished run whose predictions scatter around acc and asr (percent). shown: more for its samples.npz."""
    predicted = predictions(acc, asr, seed)
    arrays = {"predictions": vars(predicted)} | ({"samples": pictures(seed) | (shown or {})} if with_pictures else {})
    store.write(task.name, config={"seed": task.seed} if isinstance(task, Stub) else task.describe(),
                environment={"python": "3.11", "torch": "2.x", "cpu": "a test", "device": "cpu", "threads": 1,
                             "commit": "0" * 12, "source": "f" * 16, "finished": "2026-01-01T00:00:00Z"},
                metrics={**metrics(predicted), "seconds": 1.0 + task.seed, "info": info or {}}, history=history or [],
                arrays=arrays, tensors=tensors or {})


def results(root: Path, seeds: int = 2, full: bool = True) -> Results:
    """A protocol on synthetic runs: the main table, and with `full` every other item, some runs failed or missing."""
    store = Store(root)
    entries: list[Entry] = []

    def add(item: str, labels: dict[str, str], seed: int, acc: float, asr: float, history: list[dict] | None = None,
            do: bool = True) -> None:
        title = "-".join([item, *labels.values()]).replace(" ", "").replace("/", "")
        # Figures look for victims by type.
        task = Made("digits", "wrn-10-1", Recipe(1, ((0, 0.1),)), seed, title) if labels.get("defense") == "Before" \
            else Stub(title, seed)
        if {"defense", "variant"} <= set(labels):
            labels = {**labels, "settings": labels["variant"]}
        entries.append(Entry("nad", item, labels, task))
        noise = np.random.default_rng([seed, len(entries)])
        acc, asr = (float(np.clip(value + noise.normal(0, 2), 0, 100)) for value in (acc, asr))
        if do:
            write_run(store, task, acc, asr, len(entries), history)

    for seed in range(seeds):
        for attack in ATTACKS:
            for defense, variant in ROWS:
                acc, asr = LEVELS[defense]
                if attack == "SIG":
                    asr = asr / 3
                do = (attack, defense, seed) not in {("CL", "MCR", 0), ("Refool", "FP", 0)}
                add("main", {"attack": attack, "defense": defense, "variant": variant}, seed, acc, asr, do=do)
    if full:
        store.fail("main-Refool-FP-described-s0",
                   "Traceback (most recent call last):\n  ...\nValueError: no such layer\n")
        for seed in range(seeds):
            _others(add, seed)
    return Results(store, entries)


def _others(add, seed: int) -> None:
    for attack in ("BadNets", "Trojan", "Blend", "SIG"):
        for defense, variant in [ROWS[0], *ROWS[6:]]:
            add("main-released", {"attack": attack, "defense": defense, "variant": variant}, seed, *LEVELS[defense])
    for i, fraction in enumerate(("1 %", "5 %", "10 %", "15 %", "20 %")):
        for defense, variant in ROWS[6:]:
            acc, asr = LEVELS[defense]
            add("clean-fraction", {"fraction": fraction, "defense": defense, "variant": variant}, seed,
                acc - 20 / (i + 1), asr / (i + 1))
    for item, label, values in (
            ("attention", "attention", ("sum |F|", "sum |F|^2", "mean |F|^2", "max |F|^2")),
            ("distillation", "distillation", ("none (beta = 0)", "feature", "attention")),
            ("teacher", "teacher", ("victim fine-tuned on the clean subset", "the victim itself")),
            ("beta", "beta", ("0", "0.1", "0.3", "1", "3", "10")),
            ("variants", "variant", ("released", "released, beta = 0", "released-2021", "described"))):
        for i, value in enumerate(values):
            add(item, {label: value}, seed, 84 - i, 10 - i)
    for defense in ("FT", "NAD (beta = 0)", "NAD"):
        acc, asr = LEVELS[defense]
        teacher = [{"phase": "teacher", "epoch": 1, "rate": 0.1, "loss": 1.0, **metrics(predictions(60, 50, seed))}]
        student = [{"phase": "student" if epoch else "before", "epoch": epoch, "rate": 0.1, "loss": 1.0,
                    **metrics(predictions(acc - 20 / (epoch + 1), asr + 90 / (epoch + 1), seed + epoch))}
                   for epoch in range(6)]
        add("curves", {"defense": defense}, seed, acc, asr,
            [student[0], *(teacher if defense == "NAD" else []), *student[1:]])
    for defense, asr in (("FT", 10), ("MCR", 60), ("MCR, trained as in its own code", 50)):
        add("mcr", {"attack": "BadNets", "defense": defense, "variant": "described"}, seed, 82, asr)
    for victim in ("as released (no augmentation)", "standard augmentation"):
        for defense, variant in [ROWS[0], *ROWS[6:]]:
            acc, asr = LEVELS[defense]
            add("augmentation", {"victim": victim, "defense": defense, "variant": variant}, seed,
                acc, min(99, asr + 30 * (victim[0] == "s")))
