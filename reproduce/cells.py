"""What there is to run: victims and cells, each with an identity made of its configuration and its seed.

A cell is dataset x model x recipe x attack x defense x clean fraction x seed. Its victim is trained once and shared
by all defenses of the same (dataset, model, recipe, attack, seed). The identity hashes neither path nor device nor
date, so moved data keep their cache, and any change of a constant makes a new run.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from reproduce.defending import defense_module
from reproduce.finetuning import TextRecipe
from reproduce.poisoning import attack_module
from reproduce.store import identity
from reproduce.training import Recipe

NONE = "none"


def plain(value: Any) -> Any:
    """A configuration as JSON-able data, without fields marked as not changing the result.

    A field added to a configuration that has runs is marked with metadata={"since": ...}: it is left out where it has
    its default, so that those runs keep their names.
    """
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
                if f.metadata.get("identity", True)
                and not ("since" in f.metadata and getattr(value, f.name) == f.default)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def recipes(value: Any) -> list[Recipe]:
    """Every training recipe inside a configuration."""
    if isinstance(value, Recipe):
        return [value]
    if dataclasses.is_dataclass(value):
        return [r for f in dataclasses.fields(value) for r in recipes(getattr(value, f.name))]
    return []


class Task:
    """Something with an identity that produces one run folder."""

    seed: int
    victim: "Victim"

    def describe(self) -> dict[str, Any]:
        raise NotImplementedError

    def label(self) -> str:
        raise NotImplementedError

    def needs(self) -> list["Task"]:
        """The runs this one is computed from."""
        raise NotImplementedError

    @property
    def offers(self) -> str:
        """Which tensors of its run those load that need it. An exported run may lack them."""
        raise NotImplementedError

    @cached_property
    def name(self) -> str:
        """Folder name: readable, and unique by the hash of the whole configuration."""
        return f"{self.label()}-s{self.seed}-{identity(self.describe())}"


@dataclass(frozen=True)
class Published:
    """A checkpoint its authors published: where it is below the data root, its SHA-256, where it comes from, and what
    its images are normalised with (of `models.CHECKPOINT_NORMALISATIONS`; None: as its architecture has it)."""

    file: str
    sha256: str
    source: str
    normalised: str | None = None


@dataclass(frozen=True)
class Victim(Task):
    """A model trained on poisoned data; attack "none" with settings None is a clean model.

    With `published` the model is that checkpoint and nothing is trained; recipe then is None. One that is not
    `poisoned` is the clean model, which meets the attack's triggers all the same: what no defense has to go below.
    """

    dataset: str
    model: str
    recipe: Recipe | TextRecipe | None
    seed: int
    attack: str = NONE
    settings: Any = None
    published: Published | None = None
    poisoned: bool = True

    @property
    def victim(self) -> "Victim":  # type: ignore[override]
        return self

    def describe(self) -> dict[str, Any]:
        described = {"kind": "victim", "dataset": self.dataset, "model": self.model, "recipe": plain(self.recipe),
                     "seed": self.seed, "attack": self.attack, "settings": plain(self.settings)}
        if self.published:
            described["published"] = self.published.sha256
            if self.published.normalised:
                described["normalised"] = self.published.normalised
        if not self.poisoned:
            described["poisoned"] = False
        return described

    def label(self) -> str:
        return f"{'published' if self.published else 'victim' if self.poisoned else 'unpoisoned'}-{self.attack}"

    def needs(self) -> list[Task]:
        if not self.poisoned:
            return [*self.parts()]
        if self.attack != NONE and "clean-model" in attack_module(self.attack).requires(self.settings):
            return [self.clean()]
        return []

    @property
    def offers(self) -> str:
        return "model"

    def clean(self) -> "Victim":
        """The clean model of the same dataset, architecture, recipe and seed."""
        return dataclasses.replace(self, attack=NONE, settings=None, poisoned=True)

    def unpoisoned(self) -> "Victim":
        """The clean model, met by this victim's triggers."""
        return dataclasses.replace(self, poisoned=False)

    def parts(self) -> list["Victim"]:
        """Those whose runs hold what it is made of: first its model, last its trigger, where one is learned (none on
        sentences is)."""
        if self.poisoned:
            return [self]
        learned = hasattr(attack_module(self.attack), "prepare")
        return [self.clean(), *([dataclasses.replace(self, poisoned=True)] if learned else [])]


@dataclass(frozen=True)
class Cell(Task):
    """One defense on one victim. `curve` evaluates the student after every epoch (slower)."""

    victim: Victim
    defense: str
    config: Any
    clean_fraction: float
    curve: bool = False

    @property
    def seed(self) -> int:  # type: ignore[override]
        return self.victim.seed

    def describe(self) -> dict[str, Any]:
        return {"kind": "cell", "victim": self.victim.describe(), "defense": self.defense,
                "config": plain(self.config), "clean_fraction": self.clean_fraction, "curve": self.curve}

    def label(self) -> str:
        return f"{self.defense}-{'' if self.victim.poisoned else 'unpoisoned-'}{self.victim.attack}"

    def needs(self) -> list[Task]:
        base = self.base()
        return [*self.victim.parts(), *([self.victim.clean()] if self.needs_clean_model() else []),
                *([base] if base else [])]

    @property
    def offers(self) -> str:
        return "defense"

    def needs_clean_model(self) -> bool:
        return "clean-model" in defense_module(self.defense).requires(self.config)

    def base(self) -> "Cell | None":
        """The cell whose run this one starts from, where the defense's settings build on others."""
        builds_on = getattr(defense_module(self.defense), "builds_on", None)
        found = builds_on(self.config) if builds_on else None
        return dataclasses.replace(self, defense=found[0], config=found[1]) if found else None


def with_dependencies(tasks: list[Task]) -> list[Task]:
    """The tasks and everything they need, each once, every task after what it needs."""
    ordered: dict[str, Task] = {}

    def visit(task: Task) -> None:
        if task.name not in ordered:
            for needed in task.needs():
                visit(needed)
            ordered[task.name] = task

    for task in tasks:
        visit(task)
    return list(ordered.values())
