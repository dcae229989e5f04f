"""ARGD's claims: up to 94.85 % less ASR and 3.23 % more ACC than NAD; and whether its graph is what does it."""

import math
from collections.abc import Sequence

import pandas as pd

from reproduce.claims.criteria import (
    ADDS,
    FEWEST,
    NOT_RUN,
    ONE_SEED,
    REFUTED,
    SIX,
    SUPPORTED,
    UNDECIDED,
    Check,
    Claim,
    adds,
    claim,
    compared,
    defenses,
    finished,
    mean_difference,
    of,
)
from reproduce.protocols.argd import CONTROL, NODES, PAPER
from reproduce.results import Results
from reproduce.statistics import Interval
from tables.against_published import published_values
from tables.argd import STUDY
from tables.layout import BEFORE, TOOK, estimate, pairs, victims_asr


def claims(results: Results) -> list[Claim]:
    """The abstract's two claims, each read as a share and as points, and the controls."""
    read = published_values(PAPER)["claims"]
    table = defenses(results, STUDY, "described")
    runs = finished(table.get("NAD"), table.get("ARGD"))
    working = [a for a, asr in victims_asr(table[BEFORE]).items() if asr >= TOOK] if BEFORE in table else []
    wanted = read["lower-asr"]["value"]
    found = [claim(
        PAPER, "lower-asr-than-nad", f"ARGD's ASR is up to {wanted} % lower than NAD's.", read["lower-asr"]["source"],
        "On each of the six attacks with a working backdoor, ARGD as described against NAD as released, paired by "
        "seed: the reduction of mean ASR as a share of NAD's, and in points. Supported: the largest over the attacks "
        f"reaches {wanted} in one of these readings, on at least {FEWEST} seeds. Not supported: all six ran, none "
        f"reaches it, and every 95 % interval in points lies below it. {ONE_SEED}",
        [_up_to(results, table, working, "asr", wanted)], runs)]
    wanted = read["higher-acc"]["value"]
    found.append(claim(
        PAPER, "higher-acc-than-nad", f"ARGD's ACC is up to {wanted} % higher than NAD's.",
        read["higher-acc"]["source"],
        "As for ASR, with the gain of ACC.",
        [_up_to(results, table, working, "acc", wanted)], runs))
    family = [compared(table, name, "ARGD", control) for name, control in
              (("graph", NODES), ("distillation", CONTROL))]
    statements = {"graph": "ARGD's edges and embedding lower ASR beyond NAD with the same node weights, teacher and "
                           "schedule.",
                  "distillation": "ARGD's distillation lowers ASR beyond fine-tuning on the same schedule."}
    for one, check in zip(family, adds(family), strict=True):
        found.append(claim(PAPER, f"{one.subject}-adds", statements[one.subject], "control for the abstract's claim",
                           f"ARGD minus \"{one.control}\" on the same victims, working backdoors only, paired by "
                           "attack and seed. " + ADDS.format(family="both controls"), [check], one.runs))
    return found


def _up_to(results: Results, table: dict[str, pd.DataFrame], attacks: Sequence[str], measure: str,
           wanted: float) -> Check:
    """The largest gain over the attacks, as a share of NAD's value and in points."""
    gains: dict[str, Interval] = {}
    shares: dict[str, float] = {}
    seeds: list[int] = []
    for attack in attacks:
        theirs, ours = of(table, "NAD", attack), of(table, "ARGD", attack)
        if theirs is None or ours is None:
            continue
        paired = pairs(theirs, ours, measure) if measure == "asr" else pairs(ours, theirs, measure)
        if paired:
            gains[attack] = mean_difference(results, paired, measure)
            base = estimate(theirs, measure).mean
            shares[attack] = 100 * gains[attack].mean / base if base else math.nan
            seeds.append(len(paired))
    if not gains:
        return Check("six attacks", NOT_RUN, "not run")
    first, second = max(shares, key=lambda a: shares[a]), max(gains, key=lambda a: gains[a].mean)
    share, points, n = shares[first], gains[second], min(seeds)
    reached = share >= wanted or points.mean >= wanted
    ruled_out = set(gains) == set(SIX) and not reached and all(gain.below(wanted) for gain in gains.values())
    outcome = SUPPORTED if reached and n >= FEWEST else REFUTED if ruled_out else UNDECIDED
    what = "less ASR" if measure == "asr" else "more ACC"
    return Check("six attacks", outcome, f"at most {share:.1f} % {what} ({first}), and {points.mean:+.2f} points "
                 f"[{points.low:+.2f}, {points.high:+.2f}] ({second}); {len(gains)} attacks, n = {n}",
                 points.mean, points.low, points.high, n)
