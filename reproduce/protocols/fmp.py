"""FMP (Huang & Bu, ICLR 2024): the runs behind each of its tables and figures.

Victims are BackdoorBench v1's, on which FMP's code stands: PreAct-ResNet18, target 0, rate 0.1, 100 epochs (GTSRB 50).
Which attacks and baselines the paper itself reports was not readable; those here are BackdoorBench's. Everyone has 10 %
clean data, as FMP's released settings have for CIFAR-10 and CIFAR-100; the released settings of the others name 5 %,
which is an item of its own. FMP's file for GTSRB names both, and 5 % would be what is read from it: there, too, it is
10 % for everyone here.

A profile that cannot train PreAct-ResNet18 takes a narrower one. Then one map in 64 is less than one map of a layer, so
p is scaled with the width and as many maps are pruned per layer as the paper's network would lose.

What each fault of the released script is worth is also asked of the checkpoints that the authors of NAD, ARGD and
MCLDef published: WRN-16-1, trained in full by others, which cost no training here.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from defenses import fmp, ft_sam
from reproduce.cells import Victim
from reproduce.data.augment import Augment
from reproduce.poisoning import attack_module
from reproduce.protocols import BEFORE, Entry, Profile, argd, mcldef, nad
from reproduce.protocols.comparison import (
    Row,
    cell,
    comparison,
    fractions,
    never_poisoned,
    published_victim,
    row,
    sweep,
)
from reproduce.training import Cosine, Recipe

PAPER = "fmp"
METHOD = "FMP"
NO_PRUNING, RANDOM, IDLE = "FMP, no pruning", "FMP, random maps", "FMP, least active maps"

# config/attack/*/cifar10.yaml of huangd1999/BackdoorBench@6135839; the paper, as quoted: 100 epochs (GTSRB 50), SGD
# momentum 0.9, lr 0.01, batch 128, cosine annealing. Its period is 100 epochs on every data set
# (utils/aggregate_block/train_settings_generate.py). Two attacks train by their own code, at the first rate all along
# (wanet/cifar10.yaml: milestones after the last epoch; inputaware/cifar10.yaml: no schedule, or such milestones).
VICTIM = Recipe(epochs=100, rates=((0, 0.01),), batch=128, momentum=0.9, nesterov=False, weight_decay=5e-4,
                augment=Augment(crop=4, flip=True), cosine=Cosine(100))
EPOCHS = {"gtsrb": 50}
CONSTANT_RATE = ("wanet", "input_aware")
FLIPPED = ("cifar10",)      # dataset_and_transform_generate.py of the same: no flip elsewhere

ATTACKS = {"BadNets": "badnets", "Blended": "blend", "Low-frequency": "low_frequency", "SSBA": "ssba",
           "WaNet": "wanet", "Input-aware": "input_aware", "SIG": "sig"}
SMOKE_ATTACKS = ("BadNets", "Low-frequency", "SSBA")
SMOKE_FAULTS = ("noise", "leak")
NOT_OF_WIDE_RESNET = ("rotated", "summed")      # faults that a network has which runs otherwise than it is registered
RATES = (0.001, 0.01, 0.05, 0.1)

# By architecture the first layer's channels; of PreAct-ResNet18's the paper's p = 64 prunes one.
WIDTHS = {"preact-resnet-18": 64, "preact-resnet-18-w16": 16, "preact-resnet-18-w8": 8, "wrn-16-1": 16}
# label: (the file, whose trigger it answers to)
PUBLISHED = {"NAD's": (nad.AUTHORS_VICTIM, "nad"), "ARGD's": (argd.AUTHORS_VICTIM, "argd"),
             "MCLDef's": (mcldef.AUTHORS_VICTIM, "nad")}
# Where victims are shortened, so are the 100 epochs of BackdoorBench's baselines, to FMP's own 10. Neural Cleanse, with
# 80 epochs for each of ten classes, is left to the full protocol and to the smoke scale.
SHORT_EPOCHS = 10

_DESCRIBED, _RELEASED = (fmp.SETTINGS[PAPER, variant] for variant in ("described", "released"))
# The released start noise elsewhere: config/defense/feature/{cifar100,gtsrb}.yaml of ASE2023Paper/FMT@3df9827.
NOISE = {"cifar100": 0.03, "gtsrb": 0.03}
CONTROLS = {NO_PRUNING: "no-pruning", RANDOM: "random", IDLE: "activation"}
# In a table of faults: the victim, and the two methods with the choice of maps replaced, or made from more images.
BEFORE_ANY = "none: the victim"
ALL_IMAGES = "described, all images"    # where a scale cuts the scoring images, what they are worth
UNCHOSEN = {"described, random maps": fmp.SETTINGS[PAPER, "random"],
            "described, least active maps": fmp.SETTINGS[PAPER, "activation"],
            "described, no pruning": fmp.SETTINGS[PAPER, "no-pruning"],
            "released, no pruning": replace(_RELEASED, select="none")}
# Those of `LATER` have their own settings.
BASELINE_ROWS = [*(row(label, "described", PAPER) for label in ("FT", "FP", "NAD", "ANP", "CLP")),
                 row("I-BAU", "described", PAPER, "ibau"), row("NC", "described", PAPER),
                 row("RNP", "released", "rnp").under("described"),
                 row("FT-SAM", "released", "ft_sam", "ft_sam").under("described")]
BASELINES = [one.label for one in BASELINE_ROWS]
LATER = ("RNP", "FT-SAM")   # than the code that FMP's stands on: no baselines of the paper's
# That of the code that the paper compared with trains two layers only.
FROZEN_FP = row("FP", "released", PAPER)
OWN_ROWS = [Row(label, "described", "fmp", fmp.SETTINGS[PAPER, variant]) for label, variant in CONTROLS.items()]
OWN_ROWS.append(Row(METHOD, "described", "fmp", _DESCRIBED))
# But for FP, the baselines' settings are those of their released configurations in both tables.
MAIN_ROWS = [*BASELINE_ROWS, *OWN_ROWS,
             *(FROZEN_FP if one.label == FROZEN_FP.label else one.under("released") for one in BASELINE_ROWS),
             Row(NO_PRUNING, "released", "fmp", replace(_RELEASED, select="none")),
             Row(METHOD, "released", "fmp", _RELEASED)]
BRIEF = ("FT", "ANP", "FT-SAM")

EPSILONS = {"1/255": 1 / 255, "2/255": 2 / 255, "4/255": 4 / 255, "8/255": 8 / 255, "0.06": 0.06}
# Factors of p, by how many maps that prunes.
SHARES = {"4 times": 0.25, "twice": 0.5, "as many": 1.0, "half": 2.0, "a quarter": 4.0}
IMAGES = (32, 128, 256, 512)
TUNING = (1, 5, 10, 20)


def departure(profile: Profile) -> str:
    """What keeps runs at this scale from a verdict on the paper."""
    width = WIDTHS[profile.preact]
    return "" if width == 64 else f"a PreAct-ResNet18 of {width} channels in place of 64"


def entries(profile: Profile) -> list[Entry]:
    """Every run of the paper at this scale."""
    published = replace(profile, clean_fraction=0.10)
    profile = replace(published, model=profile.preact,
                      defense_epochs=profile.defense_epochs or (SHORT_EPOCHS if profile.shortened else None))
    found: list[Entry] = []
    for seed in profile.seeds:
        found += _published_faults(published, seed)
        if profile.repeats(seed):
            found += _main(profile, "main", seed)
    for seed in filter(profile.sweeps, profile.seeds):
        found += _five_percent(profile, seed) + _faults(profile, seed) + _sweeps(profile, seed)
        found += _poison_rates(profile, seed)
        for dataset in profile.elsewhere:
            found += _main(replace(profile, dataset=dataset), dataset, seed)
        if profile.name == "paper":     # with CIFAR-10's settings: the benches have others (200 epochs)
            found += [replace(entry, on_request=True) for entry in _main(
                replace(profile, dataset="tiny-imagenet"), "tiny-imagenet", seed)]
    return found


def unpoisoned(item: str) -> str:
    """The item with what was never poisoned, on the data set of an item with a main table."""
    return "never-poisoned" if item == "main" else f"never-poisoned-{item}"


def fmp_victim(profile: Profile, attack: str, seed: int, variant: str = "described", **changes: Any) -> Victim:
    """The victim of an attack in BackdoorBench's settings."""
    recipe = replace(VICTIM, epochs=EPOCHS.get(profile.dataset, VICTIM.epochs),
                     cosine=None if attack in CONSTANT_RATE else VICTIM.cosine)
    settings = replace(attack_module(attack).SETTINGS[PAPER, variant], **changes)
    return Victim(profile.dataset, profile.model, profile.victim(_on(profile.dataset, recipe)), seed, attack,
                  profile.attack(_on(profile.dataset, settings)))


def fitted(config: fmp.Config, width: int) -> fmp.Config:
    """FMP's p for a network whose first layer has `width` channels."""
    return replace(config, p=max(1, config.p * width // 64))


def _on(dataset: str, config: Any) -> Any:
    """A configuration with the data set's augmentation in every recipe."""
    if isinstance(config, Recipe):
        return replace(config, augment=replace(config.augment, flip=config.augment.flip and dataset in FLIPPED))
    changes = {field.name: _on(dataset, getattr(config, field.name)) for field in fields(config)
               if is_dataclass(getattr(config, field.name)) and not isinstance(getattr(config, field.name), Augment)}
    return replace(config, **changes)


def _fitting(profile: Profile, rows: list[Row]) -> list[Row]:
    """The rows for the profile's data set, model and scale."""
    return [replace(one, config=_own(profile, one.config)) for one in rows
            if one.defense != "nc" or profile.smoke or not profile.shortened]


def _own(profile: Profile, config: Any) -> Any:
    if isinstance(config, fmp.Config):
        noise = NOISE.get(profile.dataset, config.alpha) if config.alpha == _RELEASED.alpha else config.alpha
        config = fitted(replace(config, alpha=noise), WIDTHS[profile.model])
    if profile.dataset == "gtsrb" and config == ft_sam.SETTINGS["ft_sam", "released"]:
        config = ft_sam.SETTINGS["ft_sam", "released-gtsrb"]
    return _on(profile.dataset, config)


def _main(profile: Profile, item: str, seed: int) -> list[Entry]:
    found: list[Entry] = []
    for label in SMOKE_ATTACKS if profile.smoke else ATTACKS:
        on = fmp_victim(profile, ATTACKS[label], seed)
        found += comparison(profile, PAPER, item, on, {"attack": label}, _fitting(profile, MAIN_ROWS))
        found += never_poisoned(profile, PAPER, unpoisoned(item), on, {"attack": label})
    return found


def _five_percent(profile: Profile, seed: int) -> list[Entry]:
    """FMP with 10 % clean data beside the others with 5 %, as their released configurations have it."""
    found: list[Entry] = []
    for label in SMOKE_ATTACKS[:1] if profile.smoke else ATTACKS:
        on, own = fmp_victim(profile, ATTACKS[label], seed), _fitting(profile, MAIN_ROWS)
        found += comparison(profile, PAPER, "five-percent", on, {"attack": label},
                            [one for one in own if one.variant == "released" and one.label in BASELINES], 0.05)
        found += comparison(profile, PAPER, "five-percent", on, {"attack": label}, [own[-1]])[1:]
    return found


def _faults(profile: Profile, seed: int) -> list[Entry]:
    """What each fault of the released script is worth, on own victims."""
    return [entry for label in (SMOKE_ATTACKS[:1] if profile.smoke else SMOKE_ATTACKS)
            for entry in _with_and_without(profile, "faults", fmp_victim(profile, ATTACKS[label], seed), label)]


def _published_faults(profile: Profile, seed: int) -> list[Entry]:
    """The same on checkpoints that others published, and what is left without FMP's choice of maps."""
    found: list[Entry] = []
    for label, (checkpoint, settings) in PUBLISHED.items():
        if on := published_victim(profile, checkpoint, settings, seed):
            found.append(Entry(PAPER, "published-faults",
                               {"attack": label, "faults": BEFORE_ANY, "defense": BEFORE}, on))
            # Who does not normalise cannot do it twice.
            none = NOT_OF_WIDE_RESNET if checkpoint.normalised else (*NOT_OF_WIDE_RESNET, "normalised")
            found += _with_and_without(profile, "published-faults", on, label, none)
            found += [Entry(PAPER, "published-faults", {"attack": label, "faults": name},
                            cell(profile, on, "fmp", _own(profile, config))) for name, config in UNCHOSEN.items()]
            if profile.shortened:
                uncut = replace(profile, victim_epochs=None)
                found.append(Entry(PAPER, "published-faults", {"attack": label, "faults": ALL_IMAGES},
                                   cell(uncut, on, "fmp", _own(uncut, _DESCRIBED))))
    return [replace(entry, on_request=True) for entry in found]


def _with_and_without(profile: Profile, item: str, on: Victim, label: str, but: Sequence[str] = ()) -> list[Entry]:
    """Each fault, but some, added to the described method and taken from the released one."""
    shown = [name for name in (SMOKE_FAULTS if profile.smoke else fmp.FAULTS) if name not in but]
    settings = {"described": _DESCRIBED, **{f"described + {name}": fmp.with_fault(name) for name in shown},
                "released": _RELEASED, **{f"released - {name}": fmp.without_fault(name) for name in shown}}
    return [Entry(PAPER, item, {"attack": label, "faults": name}, cell(profile, on, "fmp", _own(profile, config)))
            for name, config in settings.items()]


def _sweeps(profile: Profile, seed: int) -> list[Entry]:
    """Everything that varies one factor, on BadNets with the described settings."""
    on = fmp_victim(profile, "badnets", seed)
    base = _own(profile, _DESCRIBED)
    most = profile.defense(base).images     # what a shortened scale cuts them to
    counts = [count for count in IMAGES if most is None or count <= most] or [1, most]
    longest = profile.defense_epochs or max(TUNING)
    tuning = [epochs for epochs in TUNING if epochs < longest] + [longest]
    found: list[Entry] = []
    for item, label, settings in (
            ("epsilon", "epsilon", {name: replace(base, eps=value, alpha=value) for name, value in EPSILONS.items()}),
            ("p", "share", {name: replace(base, p=max(1, round(base.p * share))) for name, share in SHARES.items()}),
            ("images", "images", {str(count): replace(base, images=count) for count in counts}),
            ("tuning", "tuning", {str(epochs): _tuned(base, epochs) for epochs in tuning})):
        found += sweep(profile, PAPER, item, label, on, "fmp", profile.values(settings))
    return found + fractions(profile, PAPER, on, _brief(profile))


def _tuned(config: fmp.Config, epochs: int) -> fmp.Config:
    """Fine-tuned for so many epochs, the rate annealed over them."""
    recipe = config.recipe
    assert recipe.cosine
    return replace(config, recipe=replace(recipe, epochs=epochs, cosine=replace(recipe.cosine, epochs=epochs)))


def _poison_rates(profile: Profile, seed: int) -> list[Entry]:
    """BadNets with more or fewer poisoned images."""
    return [entry for rate in (RATES[1:2] if profile.smoke else RATES)
            for entry in comparison(profile, PAPER, "poison-rate", fmp_victim(profile, "badnets", seed, rate=rate),
                                    {"rate": f"{100 * rate:g} %"}, _brief(profile))]


def _brief(profile: Profile) -> list[Row]:
    """The rows of a sweep; at smoke scale the method and its control alone."""
    labels = (METHOD, NO_PRUNING) if profile.smoke else (*BRIEF, METHOD, NO_PRUNING)
    return _fitting(profile, [one for one in MAIN_ROWS if one.variant == "described" and one.label in labels])
