"""BadActs' tables, figures and claims, from its whole protocol with made-up runs of sentences."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from reproduce.cells import Task, Victim
from reproduce.metrics import Detection, Predictions, detection_metrics, metrics
from reproduce.protocols import PROFILES, Profile, entries
from reproduce.protocols.badacts import METHOD, PAPER, REJECT, STATISTICS, THEN
from reproduce.results import Results
from reproduce.store import Store
from tables import badacts as tables
from tables import render

TARGET, COUNT, LAYERS, UNITS, SHOWN = 1, 400, 2, 24, 4
QUICK = PROFILES["quick"]
# (ACC, ASR) in percent of the made-up runs, and the suspicion that a trigger adds (0: nothing is detected).
LEVELS = {"Before": (90, 98), METHOD: (85, 12), THEN: (89, 14), REJECT: (86, 5), STATISTICS: (88, 60), "FT": (89, 70),
          "ONION": (80, 40), "BadActs, dealt anew": (70, 50)}
OTHERS = (84, 30)
TRIGGER = {"unchanged": 1.5, "degenerate": 20.0, "clean_degenerate": 2.0, "words_kept": 70.0, "length": 110.0}


def predictions(acc: float, asr: float, rng: np.random.Generator) -> Predictions:
    """Two classes, half of the test sentences each; exactly these shares but for rounding, at random places."""
    labels = np.arange(COUNT) % 2
    clean = np.where(rng.permutation(COUNT) < acc / 100 * COUNT, labels, 1 - labels)
    index = np.flatnonzero(labels != TARGET)
    triggered = np.where(rng.permutation(len(index)) < asr / 100 * len(index), TARGET, 1 - TARGET)
    arrays = (labels, clean, index, np.full(len(index), TARGET), triggered)
    return Predictions(*(array.astype(np.int32) for array in arrays))


def detection(shift: float, rng: np.random.Generator) -> Detection:
    """Suspicion of clean sentences around 0.1, of triggered ones `shift` higher; flagged above 0.15."""
    clean, triggered, held = (np.clip(rng.normal(mean, 0.03, size), 0, 1).astype(np.float32) for mean, size in (
        (0.1, COUNT), (0.1 + shift, COUNT // 2), (0.1, COUNT // 4)))
    return Detection(clean, triggered, clean > 0.15, triggered > 0.15, rng.integers(0, 2, COUNT),
                     np.full(COUNT // 2, TARGET), held)


def write_run(store: Store, task: Task, acc: float, asr: float, seed: int, shift: float | None) -> None:
    """A finished run of sentences; with a shift, one of a detector."""
    rng = np.random.default_rng(seed)
    predicted = predictions(acc, asr, rng)
    states = {f"cls_{kind}{when}": rng.normal(0, 0.5 if when else 1, (SHOWN, LAYERS, UNITS)).astype(np.float16)
              for kind in ("clean", "triggered") for when in ("", "_after")}
    samples = {"texts": np.array(["a film"] * SHOWN), "triggered": np.array(["a cf film"] * SHOWN), **states}
    arrays = {"predictions": vars(predicted), "samples": samples}
    measured, info, tensors = dict(metrics(predicted)), {}, {}
    if isinstance(task, Victim):
        info = {"trigger": TRIGGER}
    else:
        centre, width = torch.zeros(LAYERS, UNITS), 1 + torch.rand(LAYERS, UNITS, generator=torch.manual_seed(seed))
        tensors = {"defense": {"lower": centre - width / 2, "upper": centre + width / 2}}
        info = {"width": 1.5, "kept": 98.5, "restarts": 1, "judging_seconds": 3.0}
    if shift is not None:
        found = detection(shift, rng)
        arrays["scores"] = vars(found)
        measured |= detection_metrics(found, TARGET)
        info["threshold"] = 0.15
    store.write(task.name, config={"seed": task.seed},
                environment={"python": "3.11", "torch": "2.x", "cpu": "a test", "device": "cpu", "threads": 1,
                             "commit": "0" * 12, "source": "f" * 16, "finished": "2026-01-01T00:00:00Z"},
                metrics={**measured, "seconds": 1.0 + task.seed, "info": info}, history=[], arrays=arrays,
                tensors=tensors)


def made(root: Path, profile: Profile, levels: dict[str, tuple[float, float]] | None = None,
         shift: float = 0.1) -> Results:
    """All runs of the protocol, at levels that depend on the defense alone."""
    store, found = Store(root), entries(profile, [PAPER])
    for number, entry in enumerate(found):
        if store.find(entry.task.name):
            continue
        detects = entry.item.startswith("detection-") or entry.item in ("deviations", "frr") or \
            entry.labels.get("defense") in (THEN, REJECT)
        acc, asr = (LEVELS | (levels or {})).get(entry.labels.get("defense", ""), OTHERS)
        write_run(store, entry.task, acc, asr, number,
                  shift if detects and not isinstance(entry.task, Victim) else None)
    return Results(store, found)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return made(tmp_path_factory.mktemp("badacts"), QUICK)
