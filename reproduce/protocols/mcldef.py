"""MCLDef (Yue et al., ACM MM 2023): the runs behind each of its tables and figures.

Victims are those of NAD's protocol (`comparison.RELEASED`), to which the attacks WaNet and input-aware come, so that
all papers repair the same models; target 5 as in MCLDef's code, and rate 0.1 but for the clean-label attacks. The
attacks of that code (data_loader.py of Zhihao151/MCL@1ce3f44) are others: its CL stamps every image of the target
class (:310-317), its Blend is a block of 3x3 pixels (:515-532), its Trojan a stored patch, its SIG relabels. They are
the item `main-released`, on victims trained as its script and its published victim say; Refool and input-aware are in
neither of its releases. What the inverted trigger is worth shows against a trigger of as many pixels in random places,
and what the contrastive loss is worth against the cross-entropy on the same stamped images.
"""

from dataclasses import replace
from typing import Any

from defenses import anp, ibau, mcldef
from reproduce.cells import Published
from reproduce.data.augment import Augment
from reproduce.protocols import BEFORE, Entry, Profile
from reproduce.protocols.comparison import (
    AUGMENTED,
    SIX,
    Row,
    comparison,
    fractions,
    on_published,
    row,
    sweep,
    victim,
)
from reproduce.training import Recipe

PAPER = "mcldef"
METHOD = "MCLDef"
RANDOM = "MCLDef, random trigger"
CROSS_ENTROPY = "MCLDef, cross-entropy"
ESTIMATED = "MCLDef, target estimated"
EARLIER = "MCLDef, inversion of 2022"

# label: (attack, whose settings)
ATTACKS = {label: (attack, "nad") for label, attack in SIX.items()} | {
    "WaNet": ("wanet", PAPER), "Input-aware": ("input_aware", PAPER)}
SMOKE_ATTACKS = ("BadNets", "Blend", "WaNet", "Input-aware")
# As in MCLDef's code: BadNets, Trojan and SIG are NAD's, byte for byte. It tests on WaNet, but does not train for it.
OWN_ATTACKS = {"BadNets": "nad", "Trojan": "nad", "Blend": PAPER, "CL": PAPER, "SIG": "nad"}
# Epochs, batches (782 of 64: all images) and Nesterov as the published victim's file has them; rates as in
# train_badnet.py@1ce3f44:157-166, 19 epochs at the first (its last, in the file, is 0.0009); augmentation and order of
# data_loader.py:121-150. Departure: images are not normalised, as in all of our victims.
OWN_RECIPE = Recipe(epochs=49, rates=((0, 0.1), (19, 0.01)), augment=Augment(crop=4, flip=True))

_RELEASED = mcldef.SETTINGS[PAPER, "released"]

UNTOLD = Row(ESTIMATED, "released", "mcldef", mcldef.SETTINGS[PAPER, "estimated"])
OWN_ROWS = [
    Row(RANDOM, "released", "mcldef", mcldef.SETTINGS[PAPER, "random-trigger"]),
    Row(CROSS_ENTROPY, "released", "mcldef", mcldef.SETTINGS[PAPER, "cross-entropy"]),
    UNTOLD,
    Row(METHOD, "released", "mcldef", _RELEASED),
]
# Baselines with the settings of their own released code; ARGD's needs a teacher trained for 199 epochs, so it is the
# described one.
MAIN_ROWS = [
    row("FT", "released", "nad"), row("NAD", "released", "nad"), row("ARGD", "described", "argd").under("released"),
    row("ANP", "described", PAPER).under("released"), row("I-BAU", "described", PAPER, "ibau").under("released"),
    Row("I-BAU, notebook", "released", "ibau", ibau.SETTINGS["ibau", "notebook"]),
    row("NC", "described", PAPER).under("released"), *OWN_ROWS,
]
BRIEF_ROWS = [row("FT", "released", "nad"), row("NAD", "released", "nad"), *OWN_ROWS]

# The checkpoint published with MCLDef's code, that of its README's demo. Its images are normalised as in
# utils/__init__.py of that commit.
AUTHORS_VICTIM = Published(
    "checkpoints/mcldef/WRN-16-1-badnet.pth.tar", "050fe7b8dd555ccd35421c97e981833510fe82b5c95c5d68ae07e461c7a38e2e",
    "weight/CIFAR10/WRN-16-1-badnet.pth.tar of github.com/Zhihao151/MCL at 1ce3f44", "cifar10")
AUTHORS_ROWS = [*BRIEF_ROWS, Row(EARLIER, "released", "mcldef", mcldef.SETTINGS[PAPER, "released-2022"])]

TEMPERATURES = (0.1, 0.25, 0.5, 1.0, 2.0)
INVERSIONS = {
    "signed pixels (released 2023)": _RELEASED,
    "mask and pattern (released 2022)": mcldef.SETTINGS[PAPER, "released-2022"],
    "random pixels, as many": mcldef.SETTINGS[PAPER, "random-trigger"],
}
VARIANTS = {variant: mcldef.SETTINGS[PAPER, variant]
            for variant in ("described", "estimated", "released", "released-2022")}
# What ANP's choice of a threshold is worth: ours, on held-out clean images, and one by test ASR with the same mask.
HELD_OUT, ORACLE = "by held-out accuracy", "by test ASR (oracle)"
THRESHOLDS = {HELD_OUT: anp.SETTINGS[PAPER, "described"], ORACLE: anp.SETTINGS[PAPER, "oracle"]}
# utils/util.py of Zhihao151/MCL@1ce3f44, 86-96
GTSRB_RATES = ((0, 0.01), (2, 1e-3), (10, 1e-4))


def entries(profile: Profile) -> list[Entry]:
    """Every run of the paper at this scale."""
    found: list[Entry] = []
    for seed in profile.seeds:
        found += _main(profile, seed)
        if profile.dataset == "cifar10":    # released triggers come as arrays of its size
            found += _main_released(profile, seed)
        if profile.sweeps(seed):
            found += _sweeps(profile, seed)
        # The trigger in MCLDef's code is NAD's.
        found += on_published(profile, PAPER, AUTHORS_VICTIM, "nad", seed, AUTHORS_ROWS)
        if profile.name == "paper":
            found += _elsewhere(profile, seed)
    return found


def _main(profile: Profile, seed: int) -> list[Entry]:
    return [entry for label in profile.attacks(SMOKE_ATTACKS if profile.smoke else ATTACKS, seed)
            for entry in comparison(profile, PAPER, "main", victim(profile, *ATTACKS[label], "described", seed),
                                    {"attack": label}, MAIN_ROWS)]


def _main_released(profile: Profile, seed: int) -> list[Entry]:
    return [entry for label, paper in OWN_ATTACKS.items()
            for entry in comparison(profile, PAPER, "main-released",
                                    victim(profile, SIX[label], paper, "released", seed, OWN_RECIPE),
                                    {"attack": label}, BRIEF_ROWS)]


def _sweeps(profile: Profile, seed: int) -> list[Entry]:
    """Everything that varies one factor, on BadNets; ANP's threshold on all attacks."""
    on = victim(profile, "badnets", "nad", "released", seed)
    found = fractions(profile, PAPER, on, [row("FT", "released", "nad"), MAIN_ROWS[-1]])
    found += sweep(profile, PAPER, "temperature", "temperature", on, "mcldef",
                   profile.values({f"{value:g}": replace(_RELEASED, temperature=value) for value in TEMPERATURES}))
    found += sweep(profile, PAPER, "inversion", "inversion", on, "mcldef", INVERSIONS)
    for label in SMOKE_ATTACKS[:1] if profile.smoke else ATTACKS:
        attacked = victim(profile, *ATTACKS[label], "described", seed)
        chosen = sweep(profile, PAPER, "anp-threshold", "threshold", attacked, "anp", THRESHOLDS)
        before = Entry(PAPER, "anp-threshold", {"threshold": "none: the victim", "defense": BEFORE}, attacked)
        found += [replace(entry, labels={"attack": label, **entry.labels}) for entry in (before, *chosen)]
    return found + sweep(profile, PAPER, "variants", "variant", on, "mcldef", VARIANTS)


def _elsewhere(profile: Profile, seed: int) -> list[Entry]:
    """On GTSRB, with MCLDef's own schedule for it, and with ResNet-18, whose victims are augmented: without, a net of
    this size learns its training set by heart."""
    def own(rates: Any) -> list[Row]:
        return [one if one.defense != "mcldef" else
                replace(one, config=replace(one.config, recipe=replace(one.config.recipe, rates=rates)))
                for one in BRIEF_ROWS]

    found: list[Entry] = []
    gtsrb = replace(profile, dataset="gtsrb")
    resnet = replace(profile, model="resnet-18")
    # NAD's taps are those of a WideResNet.
    plain = [one for one in BRIEF_ROWS if one.label != "NAD"]
    for label in SMOKE_ATTACKS:
        attack, paper = ATTACKS[label]
        found += comparison(gtsrb, PAPER, "gtsrb", victim(gtsrb, attack, paper, "described", seed), {"attack": label},
                            own(GTSRB_RATES))
        found += comparison(resnet, PAPER, "resnet-18", victim(resnet, attack, paper, "described", seed, AUGMENTED),
                            {"attack": label}, plain)
    return found
