"""What the runner and the two benches, images and texts, say to each other."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from reproduce.cells import Cell, Task, Victim
from reproduce.store import Run, Store


@dataclass(frozen=True)
class Surroundings:
    """Where a bench works. run: the finished run of a task with the tensors it offers, computed if need be; progress:
    hears (task name, share done in [0, 1], what it is doing)."""

    store: Store
    root: Path
    device: torch.device
    run: Callable[[Task], Run]
    progress: Callable[[str, float, str], None]


@dataclass
class Outcome:
    """What a run folder will hold. arrays, tensors: {file stem: content}."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    arrays: dict[str, dict[str, np.ndarray]]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Bench(Protocol):
    """Computes victims and cells of one modality."""

    def __init__(self, at: Surroundings) -> None: ...

    @staticmethod
    def cost(task: Task) -> float: ...

    @staticmethod
    def check(victims: list[Victim], root: Path) -> None: ...

    def victim(self, victim: Victim) -> Outcome: ...

    def cell(self, cell: Cell) -> Outcome: ...
