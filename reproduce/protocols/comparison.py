"""What the papers' protocols share: victims, cells, and several defenses compared on one victim."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from defenses import nad
from reproduce.cells import Cell, Published, Victim
from reproduce.data.augment import Augment
from reproduce.defending import defense_module
from reproduce.poisoning import attack_module
from reproduce.protocols import BEFORE, NEVER, Entry, Profile
from reproduce.training import Recipe

# How NAD's, ARGD's and MCLDef's victims are trained here, so that one victim serves all three. The papers' own recipe
# is not readable to us; this is what the victim published with NAD's code shows in its file (weight/s_net,
# bboylyg/NAD@f17b713): 24 epochs of batch 64 (18,768 BatchNorm steps), last learning rate 0.01; SGD, Nesterov momentum
# 0.9, weight decay 1e-4, no augmentation and no shuffling as in train_badnet.py and data_loader.py of that commit.
# Where in those 24 epochs the rate fell from 0.1 is not in the file: after epoch 20 is the script's own place.
RELEASED = Recipe(epochs=24, rates=((0, 0.1), (20, 0.01)), shuffle=False)
AUGMENTED = replace(RELEASED, shuffle=True, augment=Augment(crop=4, flip=True))

# The six attacks of NAD and ARGD, in NAD's settings.
SIX = {"BadNets": "badnets", "Trojan": "trojan", "Blend": "blend", "CL": "cl", "SIG": "sig", "Refool": "refool"}
FRACTIONS = (0.01, 0.05, 0.10, 0.15, 0.20)
SMOKE_FRACTIONS = FRACTIONS[1:3]    # not the most, which takes longest
BETA_ZERO = "NAD (beta = 0)"


@dataclass(frozen=True)
class Row:
    """One defense of a comparison: how the table calls it, the variant whose comparison it is, the module, the
    configuration, and the variant that this is of, where it is another one."""

    label: str
    variant: str
    defense: str
    config: Any
    settings: str = ""

    def under(self, variant: str) -> "Row":
        """The same, settings and all, in the comparison of another variant."""
        return replace(self, variant=variant, settings=self.settings or self.variant)


def row(label: str, variant: str, paper: str, defense: str | None = None) -> Row:
    """The settings of a defense for a paper; the module's name is the label's in small letters unless given."""
    if label == BETA_ZERO:
        return Row(label, variant, "nad", nad.without_distillation(nad.SETTINGS[paper, variant]))
    name = defense or label.lower()
    return Row(label, variant, name, defense_module(name).SETTINGS[paper, variant])


def victim(profile: Profile, attack: str, paper: str, variant: str, seed: int, recipe: Recipe = RELEASED) -> Victim:
    """The victim of an attack in a paper's settings.

    An attacker who controls the training poisons each batch anew, so its images come in a new order in every epoch, as
    in the attacks' own code: in a fixed one the same images would be poisoned in all epochs.
    """
    module = attack_module(attack)
    settings = profile.attack(module.SETTINGS[paper, variant])
    if hasattr(module, "implant"):
        recipe = replace(recipe, shuffle=True)
    return Victim(profile.dataset, profile.model, profile.victim(recipe), seed, attack, settings)


def cell(profile: Profile, on: Victim, defense: str, config: Any, fraction: float | None = None,
         curve: bool = False) -> Cell:
    """A defense on a victim, at the profile's scale and, unless given, its share of clean data.

    A defense that is told the target label is told this victim's.
    """
    if getattr(config, "target", None) is not None:
        config = replace(config, target=on.settings.target)
    return Cell(on, defense, profile.defense(config), fraction or profile.clean_fraction, curve)


def comparison(profile: Profile, paper: str, item: str, on: Victim, labels: dict[str, str], rows: list[Row],
               fraction: float | None = None) -> list[Entry]:
    """The victim as it is, and every defense of `rows` on it."""
    found = [Entry(paper, item, {**labels, "defense": BEFORE, "variant": "-", "settings": "-"}, on)]
    found += [Entry(paper, item, {**labels, "defense": one.label, "variant": one.variant,
                                  "settings": one.settings or one.variant},
                    cell(profile, on, one.defense, one.config, fraction)) for one in rows]
    return found


def never_poisoned(profile: Profile, paper: str, item: str, on: Victim, labels: dict[str, str],
                   rows: Sequence[Row] = (), fraction: float | None = None) -> list[Entry]:
    """The victim's triggers on the model that was trained without its poison, and defenses of `rows` that meet them
    there."""
    first, *others = comparison(profile, paper, item, on.unpoisoned(), labels, list(rows), fraction)
    return [replace(first, labels={**first.labels, "defense": NEVER}), *others]


def published_victim(profile: Profile, checkpoint: Published, settings: str, seed: int) -> Victim | None:
    """The very BadNets checkpoint that a paper's authors published, if the profile has its data set and architecture.
    settings: whose trigger it answers to.

    The victim is one file for all seeds: a seed fixes the clean subset and what the defenses draw.
    """
    if (profile.dataset, profile.model) != ("cifar10", "wrn-16-1"):
        return None
    return Victim(profile.dataset, profile.model, None, seed, "badnets",
                  attack_module("badnets").SETTINGS[settings, "released"], checkpoint)


def on_published(profile: Profile, paper: str, checkpoint: Published, settings: str, seed: int,
                 rows: list[Row]) -> list[Entry]:
    """The defenses on the checkpoint that the paper's authors published, where the data root has it."""
    on = published_victim(profile, checkpoint, settings, seed)
    return [replace(entry, on_request=True) for entry in (
        comparison(profile, paper, "authors-victim", on, {"attack": "BadNets"}, rows) if on else ())]


def fractions(profile: Profile, paper: str, on: Victim, rows: list[Row]) -> list[Entry]:
    """The defenses with more or less clean data."""
    return [entry for fraction in (SMOKE_FRACTIONS if profile.smoke else FRACTIONS)
            for entry in comparison(profile, paper, "clean-fraction", on,
                                    {"fraction": f"{fraction:.0%}".replace("%", " %")}, rows, fraction)[1:]]


def sweep(profile: Profile, paper: str, item: str, label: str, on: Victim, defense: str,
          settings: dict[str, Any]) -> list[Entry]:
    """One defense on one victim, a factor varied: {value of the label: configuration}."""
    return [Entry(paper, item, {label: value}, cell(profile, on, defense, config))
            for value, config in settings.items()]
