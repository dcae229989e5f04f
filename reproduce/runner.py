"""Turns a victim or a cell into its run folder, whatever it is made of."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from reproduce import data
from reproduce.bench import Bench, Surroundings
from reproduce.cells import Cell, Task, Victim
from reproduce.images import ImageBench
from reproduce.metrics import Predictions
from reproduce.processor import repeatable
from reproduce.provenance import environment
from reproduce.store import Run, Store
from reproduce.texts import TextBench

BENCHES: dict[str, type[Bench]] = {data.IMAGE: ImageBench, data.TEXT: TextBench}


@dataclass
class Runner:
    """Computes tasks on one device. `progress` hears (task name, share done in [0, 1], what it is doing)."""

    store: Store
    root: Path
    device: torch.device
    progress: Callable[[str, float, str], None] = lambda name, share, doing: None
    note: Callable[[str], None] = print
    _benches: dict[str, Bench] = field(default_factory=dict)

    def __post_init__(self) -> None:
        repeatable(self.device)

    def run(self, task: Task, holding: str | None = None) -> Run:
        """The finished run of `task`, computed if it is not there; what it needs is computed first.

        holding: tensors it must have. Where they were left out of it (`Store.adopt`) it is computed again, and keeps,
        as `same_as_before`, the percentage of its predictions that are those of the run it replaces. Runs made from a
        former version that predicted otherwise, as on another make of processor, are set aside: one table must not
        compare defenses of two victims.
        """
        run = self.store.find(task.name, holding)
        if run:
            return run
        with self.store.lock(task.name):
            run = self.store.find(task.name, holding)
            if run:
                return run
            reason = self.store.set_aside(task.name)
            if reason:
                self.note(f"{task.name}: {reason}; set aside and computed again")
            try:
                bench = self._bench(data.modality(task.victim.dataset))
                outcome = bench.cell(task) if isinstance(task, Cell) else bench.victim(task.victim)
                predictions = Predictions(**outcome.arrays["predictions"])
                before = self.store.find(task.name)
                if before:
                    same = outcome.metrics["info"]["same_as_before"] = predictions.agreement(before.predictions())
                    self.note(f"{task.name}: computed again, because its {holding}.safetensors had been left out; "
                              f"{same:.2f} % of its predictions are as before")
                if holding or isinstance(task, Victim):     # others may have been made from it
                    # Before the new run is there: a kill in between must not leave another victim's cells beside it.
                    outdated = self.store.outdate(task.name, task.describe(), predictions)
                    if outdated:
                        self.note(f"{task.name}: {len(outdated)} runs made from a version of it that predicted "
                                  "otherwise are set aside")
                return self.store.write(task.name, config=task.describe(),
                                        environment=environment(task, self.device, self._made_from(task)),
                                        **vars(outcome))
            except Exception:
                self.store.fail(task.name, traceback.format_exc())
                raise

    def _made_from(self, task: Task) -> dict[str, str]:
        needed = [self.store.find(need.name) for need in task.needs()]
        return {run.name: run.predictions().digest() for run in needed if run}

    def _supply(self, task: Task) -> Run:
        return self.run(task, task.offers)

    def _bench(self, modality: str) -> Bench:
        if modality not in self._benches:
            at = Surroundings(self.store, self.root, self.device, self._supply, self.progress)
            self._benches[modality] = BENCHES[modality](at)
        return self._benches[modality]
