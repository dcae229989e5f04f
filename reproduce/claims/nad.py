"""NAD's claims: it erases six attacks, without obvious loss; and whether its distillation is what does it."""

import math

from reproduce.claims.criteria import (
    ADDS,
    ERASED,
    MARGIN,
    NOT_RUN,
    OBVIOUS_LOSS,
    ONE_SEED,
    REFUTED,
    SIX,
    SUPPORTED,
    UNDECIDED,
    Check,
    Claim,
    about,
    adds,
    claim,
    compared,
    defenses,
    erases,
    finished,
    loses_less,
    on_authors_victim,
)
from reproduce.results import Results
from reproduce.statistics import t_interval, wilcoxon
from tables.against_published import published_values
from tables.comparison import rows
from tables.layout import BEFORE, TOOK, Pair, pairs
from tables.nad import CONTROL, PAPER, STUDY, VARIANTS


def claims(results: Results) -> list[Claim]:
    """The abstract's two claims per variant, the control for both, and the author's remark on augmentation."""
    return about(results, PAPER, {"main": _main, "authors-victim": _on_authors_victim, "augmentation": _augmentation})


def _on_authors_victim(results: Results) -> list[Claim]:
    return on_authors_victim(results, STUDY, "released", [("NAD", CONTROL), ("NAD", "FT")],
                             "Written when three of the eight seeds under reference/ were known.")


def _main(results: Results) -> list[Claim]:
    read = published_values(PAPER)["claims"]
    found: list[Claim] = []
    for variant in VARIANTS:
        table = defenses(results, STUDY, variant)
        runs = finished(table.get(BEFORE), table.get("NAD"))
        found.append(claim(
            PAPER, f"erases-six-attacks-{variant}", f"NAD ({variant} settings) erases six attacks with 5 % clean data.",
            read["erases"]["source"],
            f"For each of the six attacks: ASR before at least {TOOK:.0f} %, and the 95 % interval of mean ASR after "
            f"NAD wholly below {ERASED:.0f} % (twice random guessing among ten classes). t interval over seeds. "
            f"{ONE_SEED} Wholly above refutes.", erases(table, "NAD", SIX), runs))
        found.append(claim(
            PAPER, f"no-obvious-loss-{variant}",
            f"NAD ({variant} settings) has no obvious loss of accuracy on clean examples.", read["erases"]["source"],
            "For each of the six attacks: the 95 % interval of the mean ACC lost (before minus after NAD, paired by "
            f"seed, all clean test images) wholly below {OBVIOUS_LOSS:.0f} points; the authors' README shows a loss of "
            f"3.53 points as a success. t interval over seeds. {ONE_SEED} Wholly above refutes.",
            loses_less(results, table, "NAD", SIX, OBVIOUS_LOSS), runs))
    family = [compared(defenses(results, STUDY, variant), variant, "NAD", CONTROL) for variant in VARIANTS]
    for one, check in zip(family, adds(family), strict=True):
        found.append(claim(
            PAPER, f"distillation-adds-{one.subject}", f"NAD's distillation term ({one.subject} settings) lowers ASR "
            "beyond fine-tuning on the same schedule.",
            f"control for the abstract's claim; {read['control']['source']} observes the contrary",
            f"NAD minus {CONTROL} on the same victims, working backdoors only, paired by attack and seed. "
            + ADDS.format(family="both settings"), [check], one.runs))
    return found


def _augmentation(results: Results) -> list[Claim]:
    values = published_values(PAPER)["claims"]["augmentation"]
    frame = rows(results, PAPER, "augmentation", "victim", "defense")
    parts = dict(iter(frame[frame.defense != BEFORE].groupby("victim", sort=False)))
    by_seed: dict[int, list[Pair]] = {}
    wanted = 0
    if len(parts) == 2:
        plain, augmented = parts.values()
        wanted = plain.defense.nunique()
        seeds = dict(zip(augmented.run, augmented.seed, strict=True))
        for defense in plain.defense.unique():
            for pair in pairs(*(part[part.defense == defense] for part in (augmented, plain)), "asr"):
                by_seed.setdefault(seeds[pair.run_first], []).append(pair)
    complete = [paired for paired in by_seed.values() if len(paired) == wanted]
    means = [sum(pair.difference for pair in paired) / wanted for paired in complete]
    interval, test = t_interval(means), wilcoxon(means)
    if not means:
        outcome, text = NOT_RUN, "not run"
    else:
        outcome = SUPPORTED if interval.above(0.0) else REFUTED if interval.below(MARGIN) else UNDECIDED
        bounds = "" if math.isnan(interval.low) else f" [{interval.low:+.2f}, {interval.high:+.2f}]"
        text = (f"ASR after FT, NAD (beta = 0) and NAD {interval.mean:+.2f} points{bounds}, n = {len(means)} "
                f"seed{'s' * (len(means) != 1)}")
    check = Check("BadNets", outcome, text, interval.mean, interval.low, interval.high, len(means), test.p)
    return [claim(PAPER, "augmentation-makes-erasure-harder",
                  "A victim trained with standard augmentation is harder to erase.", values["source"],
                  "ASR after a defense on the augmented victim minus that on the victim as released, BadNets, mean "
                  "over FT, NAD (beta = 0) and NAD, one value per seed that has all three. Supported: 95 % t interval "
                  f"over seeds above 0. Not supported: wholly below +{MARGIN:.0f} points. One seed decides nothing.",
                  [check], tuple(name for paired in complete for pair in paired for name in (pair.run_first,
                                                                                               pair.run_second)))]
