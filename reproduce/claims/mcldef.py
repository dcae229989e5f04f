"""MCLDef's claims: up to 95.79 % less ASR, less than 2 % of accuracy lost in most cases; and what does it."""

import dataclasses
from collections.abc import Sequence

from reproduce.claims.criteria import (
    FEWEST,
    NOT_RUN,
    ONE_SEED,
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    Check,
    Claim,
    about,
    claim,
    compared,
    controls,
    defenses,
    finished,
    loses_less,
    on_authors_victim,
    up_to,
)
from reproduce.protocols.mcldef import ATTACKS, CROSS_ENTROPY, METHOD, PAPER, RANDOM
from reproduce.results import Results
from tables.against_published import published_values
from tables.layout import BEFORE
from tables.mcldef import STUDY


def claims(results: Results) -> list[Claim]:
    """The abstract's two claims, the second also with the target class, and the controls."""
    return about(results, PAPER, {"main": _main, "authors-victim": _on_authors_victim})


def _on_authors_victim(results: Results) -> list[Claim]:
    return on_authors_victim(results, STUDY, "released",
                             [(METHOD, RANDOM), (METHOD, CROSS_ENTROPY), (METHOD, "FT")],
                             "Written before the runs under reference/.", ", told the target label,")


def _main(results: Results) -> list[Claim]:
    read = published_values(PAPER)["claims"]
    table = defenses(results, STUDY, "released")
    runs = finished(table.get(BEFORE), table.get(METHOD))
    wanted = read["reduces"]["value"]
    found = [claim(
        PAPER, "reduces-asr", f"MCLDef reduces ASR by up to {wanted} %.", read["reduces"]["source"],
        "On each attack with a working backdoor: ASR before minus after MCLDef (released), paired by seed, as a share "
        f"and in points. Supported: the largest over the attacks reaches {wanted} in one of these readings. Not "
        "supported: all attacks ran, none reaches it, and every 95 % interval, of share and points, lies below it. "
        f"Fewer than {FEWEST} seeds decide nothing. {ONE_SEED}",
        [up_to(results, table, METHOD, BEFORE, "asr", wanted, tuple(ATTACKS))], runs)]
    wanted = read["harmless"]["value"]
    for name, measure, which in (
            ("loses-little", "acc_nontarget", "images of other classes than the target, as its code does"),
            ("loses-little-all", "acc", "all test images, as its code does not")):
        checks = loses_less(results, table, METHOD, tuple(ATTACKS), wanted, measure)
        source = read["harmless"]["source"] if measure == "acc_nontarget" else "the same claim on all test images"
        found.append(_in_most_cases(claim(
            PAPER, name, f"MCLDef loses less than {wanted:.0f} % of accuracy in most cases"
            f"{'' if measure == 'acc_nontarget' else ', the target class included'}.", source,
            f"For each attack: the 95 % interval of the mean accuracy lost, paired by seed, measured on {which}, "
            f"wholly below {wanted:.0f} points. Supported: for more than half of the attacks. Not supported: for half "
            f"of them or more it lies wholly above. {ONE_SEED}", checks, runs), checks))
    family = [compared(table, name, METHOD, control) for name, control in
              (("inverted-trigger", RANDOM), ("contrastive-loss", CROSS_ENTROPY))]
    statements = {"inverted-trigger": "MCLDef needs the inverted trigger: with as many pixels in random places more of "
                                      "the backdoor is left.",
                  "contrastive-loss": "MCLDef's contrastive loss lowers ASR beyond cross-entropy on the same stamped "
                                      "images."}
    return found + controls(PAPER, METHOD, family, statements, "both controls")


def _in_most_cases(whole: Claim, checks: Sequence[Check]) -> Claim:
    """The claim with the outcome that most of its checks give."""
    kinds = [check.outcome for check in checks]
    outcome = UNDECIDED
    if set(kinds) == {NOT_RUN}:
        outcome = NOT_RUN
    elif 2 * kinds.count(SUPPORTED) > len(kinds):
        outcome = SUPPORTED
    elif 2 * kinds.count(REFUTED) >= len(kinds):
        outcome = REFUTED
    return dataclasses.replace(whole, outcome=outcome, verdict=outcome)
