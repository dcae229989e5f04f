"""All defenses on all attacks, in one setting each: the runs of the papers' main tables again, and what they leave out.

Every defense meets the same victims with the same clean subset and seeds, in the settings of its own code; Fine-Pruning
and MCR, of which NAD's code has none, as described, and ARGD too, see `protocols.mcldef`; FMP as described, since what
its released script does needs test images, with p and images fitted to the small network, see `protocols.fmp`.

They also meet the network that was trained on the same images, none of them poisoned: who suspects a network has to
know what a defense costs where there is nothing to remove, and whether one that looks for a backdoor says that there is
one. Nobody can be told the target label there, so MCLDef estimates it.

And that network meets every trigger: what ASR it has, no defense has to answer for.
"""

from dataclasses import replace

from reproduce.protocols import Entry, Profile, fmp
from reproduce.protocols.comparison import BETA_ZERO, Row, comparison, never_poisoned, row, victim
from reproduce.protocols.mcldef import ATTACKS, MAIN_ROWS, OWN_ROWS, SMOKE_ATTACKS, UNTOLD

PAPER = "cross"
NO_BACKDOOR = "no-backdoor"
UNPOISONED = "never-poisoned"
FMP = Row(fmp.METHOD, "released", "fmp", replace(
    fmp.fitted(row(fmp.METHOD, "described", fmp.PAPER).config, fmp.WIDTHS["wrn-16-1"]), images=256))
ROWS = [row("FT", "released", "nad"), row("FP", "described", "nad"), row("MCR", "described", "nad"),
        row(BETA_ZERO, "released", "nad"),
        *(one for one in MAIN_ROWS if one not in OWN_ROWS and one.label != "FT"), OWN_ROWS[-1],
        row("CLP", "released", "clp"), row("RNP", "released", "rnp"), row("FT-SAM", "released", "ft_sam", "ft_sam"),
        FMP]
MORE_ATTACKS = {label: (fmp.ATTACKS[label], fmp.PAPER) for label in ("Low-frequency", "SSBA")}
UNTOLD_ROWS = [UNTOLD if one is OWN_ROWS[-1] else one for one in ROWS]
SMOKE_UNTOLD = ("FT", "NC", UNTOLD.label)


def entries(profile: Profile) -> list[Entry]:
    """Every run of the cross tables at this scale."""
    attacks = {label: ATTACKS[label] for label in SMOKE_ATTACKS} if profile.smoke else ATTACKS | MORE_ATTACKS
    found = [entry for seed in profile.seeds for label in profile.attacks(attacks, seed)
             for entry in comparison(profile, PAPER, "main", victim(profile, *attacks[label], "described", seed),
                                     {"attack": label}, ROWS)]
    rows = [one for one in UNTOLD_ROWS if one.label in SMOKE_UNTOLD] if profile.smoke else UNTOLD_ROWS
    for seed in filter(profile.repeats, profile.seeds):
        clean = victim(profile, *ATTACKS["BadNets"], "described", seed).clean()
        found += comparison(profile, PAPER, NO_BACKDOOR, clean, {"attack": "none"}, rows)
        for label in attacks:
            on = victim(profile, *attacks[label], "described", seed)
            found += never_poisoned(profile, PAPER, UNPOISONED, on, {"attack": label})
    return found
