"""Protocols: one file per paper lists, explicitly, the runs behind each of its tables and figures."""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from reproduce.cells import Task
from reproduce.errors import UserError
from reproduce.finetuning import TextRecipe
from reproduce.models.encoder import BERT, LAYERS, MINILM, TINY
from reproduce.training import Recipe

AnyRecipe = TypeVar("AnyRecipe", Recipe, TextRecipe)
BEFORE = "Before"           # the row of a victim, in every table
NEVER = "Never poisoned"    # that of the model that would be the victim, had nobody poisoned its training set

PAPERS = {
    "nad": "NAD (ICLR 2021)",
    "argd": "ARGD (IJCAI 2022)",
    "mcldef": "MCLDef (ACM MM 2023)",
    "fmp": "FMP (ICLR 2024)",
    "badacts": "BadActs (Findings of ACL 2024)",
    "cross": "All defenses on all attacks",
}


@dataclass(frozen=True)
class Entry:
    """One run's place in one table. `labels` are the table's row and column keys, e.g. attack, defense, variant.

    on_request: left out unless its item is named, because it needs a file that few have.
    """

    paper: str
    item: str
    labels: dict[str, str]
    task: Task
    on_request: bool = False

    def name(self, kind: str) -> str:
        """Its item, or its label of another kind; empty without one."""
        return self.item if kind == "item" else self.labels.get(kind, "")


@dataclass(frozen=True)
class Profile:
    """A scale to run the protocols at.

    victim_epochs, defense_epochs: caps on a recipe's epochs, None for the protocol's own; a capped recipe keeps the
    shape of its learning-rate schedule.
    smoke: for showing that everything runs. Where victims are shortened, a configuration's other numbers are cut to
    what it names for that (metadata "short" of a field; of a recipe, its epochs), at smoke scale to metadata "smoke".
    dataset, model: of images; preact, elsewhere: the PreAct-ResNet18 of the protocol that is about it, and the data
    sets it goes on to; texts, encoder: the data sets and the encoder of sentences.
    only: the attacks and defenses that are run, in words, where not all of them are.
    """

    name: str
    note: str
    dataset: str
    model: str
    seeds: tuple[int, ...]
    clean_fraction: float = 0.05
    victim_epochs: int | None = None
    defense_epochs: int | None = None
    precision: str = "fp32"
    graph: bool = False
    smoke: bool = False
    preact: str = "preact-resnet-18"
    elsewhere: tuple[str, ...] = ("cifar100", "gtsrb")
    texts: tuple[str, ...] = ("sst-2", "yelp", "hsol", "agnews-small")
    encoder: str = BERT
    only: str = ""

    @property
    def shortened(self) -> bool:
        """Whether this is less than the exact protocol."""
        return self.victim_epochs is not None

    @property
    def encoder_layers(self) -> int:
        """How many layers the encoder has; unknown ones are taken for BERT's base size."""
        return LAYERS.get(self.encoder, LAYERS[BERT])

    def sweeps(self, seed: int) -> bool:
        """Whether factors are varied at this seed: outside the exact protocol at one alone."""
        return not self.shortened or seed == self.seeds[0]

    def repeats(self, seed: int) -> bool:
        """Whether what takes long is run at this seed: at smoke scale at one alone."""
        return not self.smoke or seed == self.seeds[0]

    def attacks(self, listed: Iterable[str], seed: int) -> list[str]:
        """Those of the listed attacks that are run at this seed: for a second seed to show, two are enough."""
        return list(listed)[:2] if self.smoke and seed != self.seeds[0] else list(listed)

    def values(self, listed: dict[str, Any]) -> dict[str, Any]:
        """Those of a factor's values that are run: to show that it is varied, two are enough."""
        return dict(list(listed.items())[:2]) if self.smoke else listed

    def victim(self, recipe: AnyRecipe) -> AnyRecipe:
        """A victim's recipe at this scale."""
        return self._recipe(recipe, self.victim_epochs)

    def attack(self, settings: Any) -> Any:
        """An attack's settings at this scale."""
        return self._scaled(settings, self.victim_epochs)

    def defense(self, config: Any) -> Any:
        """A defense's configuration, with every recipe in it, at this scale."""
        return self._scaled(config, self.defense_epochs)

    def _scaled(self, config: Any, epochs: int | None) -> Any:
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            cap = field.metadata.get("smoke" if self.smoke else "short") if self.shortened else None
            if isinstance(value, Recipe | TextRecipe):
                changes[field.name] = self._recipe(value, cap or epochs)
            elif dataclasses.is_dataclass(value):
                changes[field.name] = self._scaled(value, epochs)
            elif cap:
                changes[field.name] = cap if value is None else min(value, cap)     # None: no limit
        return dataclasses.replace(config, **changes)

    def _recipe(self, recipe: AnyRecipe, epochs: int | None) -> AnyRecipe:
        if isinstance(recipe, TextRecipe):  # short already
            return dataclasses.replace(recipe, precision=self.precision)
        return dataclasses.replace(shorten(recipe, epochs), precision=self.precision, graph=self.graph)


def shorten(recipe: Recipe, epochs: int | None) -> Recipe:
    """The recipe cut to `epochs`, its learning-rate schedule in proportion; unchanged if it is no longer."""
    if epochs is None or recipe.epochs <= epochs:
        return recipe
    if recipe.cosine:
        period = max(1, recipe.cosine.epochs * epochs // recipe.epochs)
        return dataclasses.replace(recipe, epochs=epochs, cosine=dataclasses.replace(recipe.cosine, epochs=period))
    rates: dict[int, float] = {}
    for first, rate in recipe.rates:
        rates[first * epochs // recipe.epochs] = rate
    return dataclasses.replace(recipe, epochs=epochs, rates=tuple(rates.items()))


PROFILES = {
    profile.name: profile for profile in (
        Profile("quick", "smoke scale: embedded digits and sentences, shortened victims; shows that everything runs, "
                         "says nothing about the papers", "digits", "wrn-10-0.5", (0, 1), clean_fraction=0.10,
                victim_epochs=6, defense_epochs=3, smoke=True, preact="preact-resnet-18-w8",
                elsewhere=(), texts=("sentences",), encoder=TINY),
        Profile("cpu", "real CIFAR-10, victims cut to 12 epochs, what else takes long cut too, FMP on a "
                       "narrow network",
                "cifar10", "wrn-16-1", (0, 1), victim_epochs=12, preact="preact-resnet-18-w16", elsewhere=("gtsrb",),
                texts=("sst-2",), encoder=MINILM),
        Profile("paper", "the exact protocol", "cifar10", "wrn-16-1", (0, 1, 2, 3, 4, 5)),
    )
}


def departure(paper: str, profile: Profile) -> str:
    """What of a paper's protocol the profile replaces by something else or leaves out, in words; empty if nothing."""
    named: Callable[[Profile], str] = getattr(importlib.import_module(f"reproduce.protocols.{paper}"), "departure",
                                              lambda profile: "")
    return " and ".join(filter(None, (named(profile), profile.only)))


def entries(profile: Profile, papers: list[str], items: Sequence[str] = (), attacks: Sequence[str] = (),
            defenses: Sequence[str] = ()) -> list[Entry]:
    """Every entry of the chosen papers at this scale, or those of the named items, attacks and defenses only.

    Attacks and defenses are named as tables name them, in capitals or not; entries that have none are left out where
    some are named. What there is before a defense stays.
    """
    found: list[Entry] = []
    for paper in papers:
        listed: Callable[[Profile], list[Entry]] = importlib.import_module(f"reproduce.protocols.{paper}").entries
        found += listed(profile)
    found = [entry for entry in _named("item", items, found) if items or not entry.on_request]
    found = _named("attack", attacks, found)
    if not defenses:
        return found
    kept = _named("defense", defenses, [entry for entry in found if entry.name("defense") != BEFORE])
    places = {(entry.paper, entry.item) for entry in kept}
    return [entry for entry in found if entry in kept or (
        entry.name("defense") == BEFORE and (entry.paper, entry.item) in places)]


def _named(kind: str, asked: Sequence[str], found: list[Entry]) -> list[Entry]:
    """The entries whose name of this kind is one of those asked for; all of them if none is."""
    if not asked:
        return found
    known = dict.fromkeys(name for entry in found if (name := entry.name(kind)))
    wanted = {each.casefold() for each in asked}
    if unknown := [each for each in asked if each.casefold() not in map(str.casefold, known)]:
        raise UserError(f"unknown {kind} {', '.join(unknown)}: choose from {'; '.join(known)}")
    return [entry for entry in found if entry.name(kind).casefold() in wanted]
