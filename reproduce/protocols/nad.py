"""NAD (Li et al., ICLR 2021): the runs behind each of its tables and figures."""

from dataclasses import replace

from defenses import nad
from reproduce.cells import Published
from reproduce.protocols import Entry, Profile
from reproduce.protocols.comparison import (
    AUGMENTED,
    BETA_ZERO,
    RELEASED,
    SIX,
    cell,
    comparison,
    fractions,
    on_published,
    row,
    sweep,
    victim,
)

PAPER = "nad"

AUTHORS_VICTIM = Published(
    "checkpoints/nad/WRN-16-1-S-model_best.pth.tar", "97815be524b153b0830f04bbfcf8f84fbe593b719a650357c694bae6cee60609",
    "weight/s_net/WRN-16-1-S-model_best.pth.tar of github.com/bboylyg/NAD at f17b713")

# The triggers of NAD's own code, and Refool as BackdoorBench made it, since at its authors' random strength it hardly
# takes at this size.
RELEASED_ATTACKS = {"BadNets": ("badnets", "released"), "Trojan": ("trojan", "released"),
                    "Blend": ("blend", "released"), "SIG": ("sig", "released"),
                    "Refool (BackdoorBench)": ("refool", "backdoorbench")}
DESCRIBED_ROWS = [row(label, "described", PAPER) for label in ("FT", "FP", "MCR", BETA_ZERO, "NAD")]
RELEASED_ROWS = [row(label, "released", PAPER) for label in ("FT", BETA_ZERO, "NAD")]
MCR_ROWS = [*(row(label, "described", PAPER) for label in ("FT", "MCR")),
            row("MCR, trained as in its own code", "released", "mcr", "mcr").under("described")]
FRACTION_ROWS = [row(label, "released", PAPER) for label in ("FT", "FP", "MCR", BETA_ZERO, "NAD")]

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
BETAS = {f"{factor:g}": replace(_NAD, betas=tuple(factor * beta for beta in _NAD.betas))
         for factor in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)}
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
        found += _main(profile, seed)
        if profile.sweeps(seed):
            found += _sweeps(profile, seed) + _augmentation(profile, seed) + _curve_finding(profile, seed)
        found += on_published(profile, PAPER, AUTHORS_VICTIM, PAPER, seed, RELEASED_ROWS)
    return found


def _main(profile: Profile, seed: int) -> list[Entry]:
    """The main table: attacks as described by their own papers, then those of the released code."""
    found: list[Entry] = []
    for label in profile.attacks(SIX, seed):
        found += comparison(profile, PAPER, "main", victim(profile, SIX[label], PAPER, "described", seed),
                            {"attack": label}, DESCRIBED_ROWS + RELEASED_ROWS)
    if profile.dataset == "cifar10":  # released triggers come as arrays of its size; the embedded data set has none
        for label, (attack, variant) in RELEASED_ATTACKS.items():
            found += comparison(profile, PAPER, "main-released", victim(profile, attack, PAPER, variant, seed),
                                {"attack": label}, RELEASED_ROWS)
    return found


def _sweeps(profile: Profile, seed: int) -> list[Entry]:
    """Everything that varies one factor, on BadNets with the released settings."""
    on = victim(profile, "badnets", PAPER, "released", seed)
    found = fractions(profile, PAPER, on, FRACTION_ROWS)
    for item, label, settings in (
            ("attention", "attention", ATTENTIONS), ("distillation", "distillation", DISTILLATIONS),
            ("teacher", "teacher", profile.values(TEACHERS)),
            ("beta", "beta", profile.values(BETAS)),
            ("variants", "variant", VARIANTS)):
        found += sweep(profile, PAPER, item, label, on, "nad", settings)
    found += [Entry(PAPER, "curves", {"defense": one.label}, cell(profile, on, one.defense, one.config, curve=True))
              for one in RELEASED_ROWS]
    return found


def _augmentation(profile: Profile, seed: int) -> list[Entry]:
    """Does ordinary augmentation in the victim's training make the backdoor harder to erase?"""
    found: list[Entry] = []
    for label, recipe in (("as released (no augmentation)", RELEASED), ("standard augmentation", AUGMENTED)):
        found += comparison(profile, PAPER, "augmentation",
                            victim(profile, "badnets", PAPER, "released", seed, recipe), {"victim": label},
                            RELEASED_ROWS)
    return found


def _curve_finding(profile: Profile, seed: int) -> list[Entry]:
    """Does MCR repair what it leaves in the main table, if its curve is trained for as long as its own code does?"""
    return [entry for label, attack in profile.values(SIX).items()
            for entry in comparison(profile, PAPER, "mcr", victim(profile, attack, PAPER, "described", seed),
                                    {"attack": label}, MCR_ROWS)]
