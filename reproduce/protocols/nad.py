"""NAD (Li et al., ICLR 2021): the runs behind each of its tables and figures.

Victim recipes. The paper's own is not readable to us. `RELEASED` is what the authors' published victim shows in its
file (weight/s_net, bboylyg/NAD@f17b713): 24 epochs of batch 64 (18,768 BatchNorm steps), last learning rate 0.01; SGD,
Nesterov momentum 0.9, weight decay 1e-4, no augmentation and no shuffling as in train_badnet.py and data_loader.py of
the same commit. Where in those 24 epochs the rate fell from 0.1 is not in the file: after epoch 20 is the script's own
place. `AUGMENTED` differs in shuffling, random crop and flip only.
"""

from dataclasses import replace
from typing import Any

from defenses import nad
from reproduce.cells import Cell, Published, Victim
from reproduce.data.augment import Augment
from reproduce.defending import defense_module
from reproduce.poisoning import attack_module
from reproduce.protocols import Entry, Profile
from reproduce.training import Recipe

PAPER = "nad"
RELEASED = Recipe(epochs=24, rates=((0, 0.1), (20, 0.01)), shuffle=False)
AUGMENTED = replace(RELEASED, shuffle=True, augment=Augment(crop=4, flip=True))

AUTHORS_VICTIM = Published(
    "checkpoints/nad/WRN-16-1-S-model_best.pth.tar", "97815be524b153b0830f04bbfcf8f84fbe593b719a650357c694bae6cee60609",
    "weight/s_net/WRN-16-1-S-model_best.pth.tar of github.com/bboylyg/NAD at f17b713")

ATTACKS = {"BadNets": "badnets", "Trojan": "trojan", "Blend": "blend", "CL": "cl", "SIG": "sig", "Refool": "refool"}
# The triggers of NAD's own code, and Refool as BackdoorBench made it, since at its authors' random strength it hardly
# takes at this size.
RELEASED_ATTACKS = {"BadNets": ("badnets", "released"), "Trojan": ("trojan", "released"),
                    "Blend": ("blend", "released"), "SIG": ("sig", "released"),
                    "Refool (BackdoorBench)": ("refool", "backdoorbench")}
FRACTIONS = (0.01, 0.05, 0.10, 0.15, 0.20)
BETA_FACTORS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
BETA_ZERO = "NAD (beta = 0)"
RELEASED_ROWS = [("FT", "released"), (BETA_ZERO, "released"), ("NAD", "released")]

_NAD = nad.SETTINGS[PAPER, "released"]
ATTENTIONS = {
    "sum |F|": replace(_NAD, attention="sum"),
    "sum |F|^2": _NAD,
    "sum |F|^3": replace(_NAD, p=3.0),
    "mean |F|^2": replace(_NAD, attention="mean-p"),
    "max |F|^2": replace(_NAD, attention="max-p"),
}
# Raw features are compared by their mean squared difference, whose scale is not that of unit maps: the factor is ours.
FEATURE_BETAS = (1.0, 1.0, 1.0)
DISTILLATIONS = {
    "none (beta = 0)": nad.without_distillation(_NAD),
    "feature": replace(_NAD, distill="feature", betas=FEATURE_BETAS),
    "attention": _NAD,
}
TEACHERS = {
    "victim fine-tuned on the clean subset": _NAD,
    "the victim itself": replace(_NAD, teacher="victim"),
    "from scratch on the clean subset": replace(_NAD, teacher="scratch"),
    "WRN-16-2 from scratch on the clean subset": replace(_NAD, teacher="scratch", teacher_model="wrn-16-2"),
    "WRN-40-1 from scratch on the clean subset": replace(_NAD, teacher="scratch", teacher_model="wrn-40-1"),
    "clean model, full training set (oracle)": replace(_NAD, teacher="clean"),
}
VARIANTS = {
    "released": _NAD,
    "released, beta = 0": nad.without_distillation(_NAD),
    "released-2021": nad.SETTINGS[PAPER, "released-2021"],
    "described": nad.SETTINGS[PAPER, "described"],
    "described, beta = 0": nad.without_distillation(nad.SETTINGS[PAPER, "described"]),
}


def entries(profile: Profile) -> list[Entry]:
    """Every run of the paper at this scale."""
    found: list[Entry] = []
    for seed in profile.seeds:
        found += _main(profile, seed) + _sweeps(profile, seed) + _augmentation(profile, seed)
        if profile.dataset == "cifar10" and profile.model == "wrn-16-1":
            found += _authors_victim(profile, seed)
    return found


def _victim(profile: Profile, attack: str, variant: str, seed: int, recipe: Recipe = RELEASED) -> Victim:
    settings = attack_module(attack).SETTINGS[PAPER, variant]
    return Victim(profile.dataset, profile.model, profile.victim(recipe), seed, attack, settings)


def _cell(profile: Profile, victim: Victim, defense: str, config: Any, fraction: float | None = None,
          curve: bool = False) -> Cell:
    return Cell(victim, defense, profile.defense(config), fraction or profile.clean_fraction, curve)


def _setting(defense: str, variant: str) -> tuple[str, Any]:
    """(module, configuration) behind a row label of the comparison."""
    if defense == BETA_ZERO:
        return "nad", nad.without_distillation(nad.SETTINGS[PAPER, variant])
    name = defense.lower()
    return name, defense_module(name).SETTINGS[PAPER, variant]


def _comparison(profile: Profile, item: str, victim: Victim, labels: dict[str, str], rows: list[tuple[str, str]],
                fraction: float | None = None) -> list[Entry]:
    """The victim as it is, and every (defense, variant) of `rows` on it."""
    found = [Entry(PAPER, item, {**labels, "defense": "Before", "variant": "-"}, victim)]
    for defense, variant in rows:
        cell = _cell(profile, victim, *_setting(defense, variant), fraction)
        found.append(Entry(PAPER, item, {**labels, "defense": defense, "variant": variant}, cell))
    return found


def _main(profile: Profile, seed: int) -> list[Entry]:
    """The main table: attacks as described by their own papers, then those of the released code."""
    described = [("FT", "described"), ("FP", "described"), ("MCR", "described"), (BETA_ZERO, "described"),
                 ("NAD", "described")]
    found: list[Entry] = []
    for label, attack in ATTACKS.items():
        found += _comparison(profile, "main", _victim(profile, attack, "described", seed), {"attack": label},
                             described + RELEASED_ROWS)
    if profile.dataset == "cifar10":  # released triggers come as arrays of its size; the embedded data set has none
        for label, (attack, variant) in RELEASED_ATTACKS.items():
            found += _comparison(profile, "main-released", _victim(profile, attack, variant, seed),
                                 {"attack": label}, RELEASED_ROWS)
    return found


def _sweeps(profile: Profile, seed: int) -> list[Entry]:
    """Everything that varies one factor, on BadNets with the released settings."""
    victim = _victim(profile, "badnets", "released", seed)
    found: list[Entry] = []

    def sweep(item: str, key: str, settings: dict[str, nad.Config]) -> None:
        found.extend(Entry(PAPER, item, {key: label}, _cell(profile, victim, "nad", config))
                     for label, config in settings.items())

    for fraction in FRACTIONS:
        found += _comparison(profile, "clean-fraction", victim, {"fraction": f"{fraction:.0%}".replace("%", " %")}, [
            ("FT", "released"), ("FP", "released"), ("MCR", "released"), (BETA_ZERO, "released"), ("NAD", "released"),
        ], fraction)[1:]
    sweep("attention", "attention", ATTENTIONS)
    sweep("distillation", "distillation", DISTILLATIONS)
    sweep("teacher", "teacher", TEACHERS)
    sweep("beta", "beta", {f"{factor:g}": replace(_NAD, betas=tuple(factor * beta for beta in _NAD.betas))
                           for factor in BETA_FACTORS})
    sweep("variants", "variant", VARIANTS)
    for defense in ("FT", BETA_ZERO, "NAD"):
        cell = _cell(profile, victim, *_setting(defense, "released"), curve=True)
        found.append(Entry(PAPER, "curves", {"defense": defense}, cell))
    return found


def _augmentation(profile: Profile, seed: int) -> list[Entry]:
    """Does ordinary augmentation in the victim's training make the backdoor harder to erase?"""
    found: list[Entry] = []
    for label, recipe in (("as released (no augmentation)", RELEASED), ("standard augmentation", AUGMENTED)):
        found += _comparison(profile, "augmentation", _victim(profile, "badnets", "released", seed, recipe),
                             {"victim": label}, RELEASED_ROWS)
    return found


def _authors_victim(profile: Profile, seed: int) -> list[Entry]:
    """The defenses on the very checkpoint the authors published, where the data root has it."""
    trigger = attack_module("badnets").SETTINGS[PAPER, "released"]
    victim = Victim(profile.dataset, profile.model, None, seed, "badnets", trigger, AUTHORS_VICTIM)
    return [replace(entry, on_request=True)
            for entry in _comparison(profile, "authors-victim", victim, {"attack": "BadNets"}, RELEASED_ROWS)]
