"""Protocol entries joined to the runs that exist: what tables, figures and claims are built from."""

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from reproduce.cells import Cell, Task, Victim
from reproduce.protocols import Entry
from reproduce.statistics import paired_difference
from reproduce.store import Run, Store

# Those that a run stores, and two that follow from its predictions.
STORED = ("acc", "acc_nontarget", "asr", "ra", "auroc", "auroc_target", "far", "frr", "n_clean", "n_nontarget",
          "seconds")
MEASURES = (*STORED, "base_rate", "excess")


def processor(run: Run) -> str:
    """The name of the CPU, or of the GPU, that a run was computed on."""
    environment = run.json("environment")
    device = environment.get("device", "unknown")
    return environment.get("cpu", "an unknown CPU") if device == "cpu" else device


@dataclass
class Results:
    """All entries of one profile and the store their runs are in, as it was when each run was first asked for:
    a run's checksums are verified once."""

    store: Store
    entries: list[Entry]
    _seen: dict[str, tuple[str, Run | None]] = field(default_factory=dict)
    _frames: dict[tuple[str, str], pd.DataFrame] = field(default_factory=dict)
    _hits: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def frame(self, paper: str, item: str) -> pd.DataFrame:
        """One row per entry of a table: its labels, seed, status, run name, and the measures (NaN where not done).

        Measures are in percent, seconds in seconds, those of the run that a cell starts from included. excess_low and
        excess_high: 95 % interval of one run's excess ASR, over its test samples. Rows keep the protocol's order.
        dataset and model are the victim's. A label with a measure's name (the FRR a threshold is chosen for) is the
        column "<name>_set". processor: what a finished run was computed on.
        """
        if (paper, item) not in self._frames:
            self._frames[paper, item] = self._frame(paper, item)
        return self._frames[paper, item].copy()

    def _frame(self, paper: str, item: str) -> pd.DataFrame:
        rows = []
        for entry in self.entries:
            if (entry.paper, entry.item) != (paper, item):
                continue
            run = self.run(entry.task)
            measured = run.json("metrics") if run else {}
            if run:
                measured["seconds"] = self._seconds(entry.task)
            labels = {f"{key}_set" if key in MEASURES else key: value for key, value in entry.labels.items()}
            victim = getattr(entry.task, "victim", None)
            rows.append({**labels, "seed": entry.task.seed, "run": entry.task.name,
                         "status": self.status(entry.task.name), "dataset": victim.dataset if victim else None,
                         "model": victim.model if victim else None,
                         "published": bool(getattr(victim, "published", None)),
                         "processor": processor(run) if run else None,
                         **{key: measured.get(key) for key in STORED}, **self._excess(run)})
        frame = pd.DataFrame(rows)
        for key in MEASURES:
            if key in frame:
                frame[key] = pd.to_numeric(frame[key])
        return frame

    def _excess(self, run: Run | None) -> dict[str, float]:
        """base_rate, excess, excess_low and excess_high of a run, NaN without a triggered sample."""
        hits = self.hits(run.path.name) if run else {}
        if not len(hits.get("asr", ())):
            return dict.fromkeys(("base_rate", "excess", "excess_low", "excess_high"), math.nan)
        found = paired_difference(hits["asr"], hits["base_rate"])
        return {"base_rate": 100 * float(np.mean(hits["base_rate"])), "excess": found.mean, "excess_low": found.low,
                "excess_high": found.high}

    def _seconds(self, task: Task) -> float:
        """Of a run and of those it starts from; NaN where one of these is not there."""
        run, base = self.run(task), task.base() if isinstance(task, Cell) else None
        own = run.json("metrics")["seconds"] if run else math.nan
        return own if base is None or self._alone(task, base) else own + self._seconds(base)

    def _alone(self, task: Cell, base: Cell) -> bool:
        """Whether a run began as its base does and so did itself what it could have had from there: one from before
        the two shared it."""
        begins = [run.history()[:1] for run in map(self.run, (task, base)) if run]
        return task.defense == base.defense and len(begins) == 2 and all(begins) and (
            begins[0][0]["phase"] == begins[1][0]["phase"])

    def status(self, name: str) -> str:
        """done, failed, damaged or missing."""
        return self._look(name)[0]

    def run(self, task: Task) -> Run | None:
        """The finished run of a task."""
        return self.named(task.name)

    def named(self, name: str) -> Run | None:
        """The finished run of that name."""
        return self._look(name)[1]

    def finished(self, name: str) -> Run:
        """The run of that name, which a frame has just called done."""
        run = self.named(name)
        assert run is not None, f"{name} was finished a moment ago"
        return run

    def hits(self, name: str) -> dict[str, np.ndarray]:
        """Per-sample outcome (bool) behind each measure that counts, of a finished run."""
        if name not in self._hits:
            self._hits[name] = self.finished(name).hits()
        return self._hits[name]

    def _look(self, name: str) -> tuple[str, Run | None]:
        if name not in self._seen:
            run = self.store.find(name)
            self._seen[name] = ("done", run) if run else (self.store.status(name), None)
        return self._seen[name]

    def victims(self, paper: str, item: str) -> dict[tuple[str, int], Run]:
        """Finished victims behind a table's cells by (attack label, seed)."""
        found = {}
        for entry in self.entries:
            if (entry.paper, entry.item) == (paper, item) and isinstance(entry.task, Victim):
                run = self.run(entry.task)
                if run:
                    found[entry.labels["attack"], entry.task.seed] = run
        return found
