"""FMP's claims: its averages on CIFAR-10, its distance to the baselines, and whether the pruning does it."""

from collections.abc import Callable
from dataclasses import replace

import pandas as pd

from reproduce.claims.criteria import (
    FEWEST,
    NO_ROWS,
    NOT_RUN,
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    Check,
    Claim,
    about,
    above,
    below,
    claim,
    compared,
    controls,
    defenses,
    finished,
)
from reproduce.protocols.fmp import BASELINES, BEFORE_ANY, IDLE, LATER, METHOD, NO_PRUNING, PAPER, RANDOM
from reproduce.results import Results
from reproduce.statistics import Interval, over_groups
from tables.against_published import WIDE, published_values
from tables.comparison import rows
from tables.fmp import CHECKPOINTS, STUDY, carriers
from tables.layout import BEFORE, measured, not_taken, possible
from tables.paired import against
from tables.render import bounds

VARIANTS = ("described", "released")
DESCRIBED = "FMP (as described)"
STATEMENTS = {"pruning": "Pruning lowers ASR beyond the same fine-tuning without it.",
              "scoring": "FMP's choice of maps lowers ASR beyond as many maps at random.",
              "adversarial-scoring": "FMP's choice of maps lowers ASR beyond as many of the least active maps."}
CONTROLS = (("pruning", NO_PRUNING), ("scoring", RANDOM), ("adversarial-scoring", IDLE))
THREE = "the three controls"


def claims(results: Results) -> list[Claim]:
    """The abstract's numbers, for the described and for the released method, and the controls."""
    return about(results, PAPER, {"main": _main, "gtsrb": _on_gtsrb, "published-faults": _on_published})


def _main(results: Results) -> list[Claim]:
    read = published_values(PAPER)["claims"]
    counted = carriers(results, "main").data
    found = []
    for variant in VARIANTS:
        table = defenses(results, STUDY, variant)
        ending = "" if variant == "described" else f"-{variant}"
        runs = finished(table.get(METHOD))
        for measure, which, statement in (
                ("asr", "below", f"FMP's ASR is {read['asr']['value']} % on average over the attacks on CIFAR-10"),
                ("ra", "above", f"FMP's RA is {read['ra']['value']:.2f} % on CIFAR-10")):
            wanted = read[measure]["value"]
            found.append(claim(
                PAPER, f"{measure}{ending}", f"{statement} (as {variant}).", read[measure]["source"],
                f"The 95 % interval of the average over the attacks that took wholly {which} {wanted}, or containing "
                f"it and no wider than {WIDE:.0f} points: supported. Wholly on the other side: not supported. Fewer "
                f"than {FEWEST} runs, or an attack without any, decide nothing.",
                [_average(table, measure, wanted)], runs))
        found += _range(results, table, variant, read, ending)
        found.append(_maps(counted, variant, read["maps"], ending))
    table = defenses(results, STUDY, "described")
    family = [compared(table, name, METHOD, control) for name, control in CONTROLS]
    return found + controls(PAPER, DESCRIBED, family, STATEMENTS, THREE)


def _on_gtsrb(results: Results) -> list[Claim]:
    """The controls once more, on GTSRB."""
    table = defenses(results, STUDY, "described", "gtsrb")
    family = [compared(table, f"gtsrb-{name}", METHOD, control) for name, control in CONTROLS]
    return controls(PAPER, DESCRIBED, family, _stated("gtsrb", "on GTSRB"), THREE,
                    written=" Written when BadNets and Blended had run with one seed, before the other attacks.")


def _on_published(results: Results) -> list[Claim]:
    """The controls once more, on checkpoints that the authors of other papers published."""
    frame = rows(results, PAPER, "published-faults", "attack", "faults")
    table = {name.removeprefix("described, "): part for name, part in frame.groupby("faults", sort=False)}
    table[BEFORE] = table.pop(BEFORE_ANY)
    family = [compared(table, f"published-{name}", "described", control.removeprefix("FMP, "))
              for name, control in CONTROLS]
    found = controls(PAPER, DESCRIBED, family, _stated("published", "on published checkpoints"), THREE,
                     f"{CHECKPOINTS}, BadNets, paired by checkpoint and seed, which stand for attacks here",
                     " Written after the runs under reference/.")
    return [replace(one, scale="published WRN-16-1 checkpoints in place of FMP's own victims") for one in found]


def _stated(prefix: str, where: str) -> dict[str, str]:
    """What is claimed against each control, on other victims; by the comparisons' names there."""
    return {f"{prefix}-{name}": f"{text.removesuffix('.')}, {where}." for name, text in STATEMENTS.items()}


def _average(table: dict, measure: str, wanted: float) -> Check:
    """FMP's average over the attacks that took against the published one; a lower ASR and a higher RA meet it too."""
    ours = table.get(METHOD, NO_ROWS)
    weak = not_taken(table[BEFORE]) if BEFORE in table else []
    sought = [attack for attack in dict.fromkeys(ours.attack) if attack not in weak]
    done = measured(ours[ours.attack.isin(sought)], measure)
    if not len(done):
        return Check("average", NOT_RUN, "not run")
    interval = possible(over_groups([part[measure].to_list() for _, part in done.groupby("attack", sort=False)]),
                        measure)
    outcome = _met(below if measure == "asr" else above, interval, wanted)
    # That no attack may be missing was added after the first runs and only withholds verdicts.
    if len(done) < FEWEST or set(done.attack) != set(sought) or BEFORE not in table:
        outcome = UNDECIDED
    left_out = f"; without {', '.join(weak)}, which did not take" if weak else ""
    return Check("average", outcome, f"{interval.mean:.2f}{bounds(interval.low, interval.high, 2)}, mean over attacks: "
                 f"{', '.join(done.attack.unique())} (runs: {len(done)}){left_out}", interval.mean, interval.low,
                 interval.high, len(done))


def _maps(counted: pd.DataFrame, variant: str, read: dict, ending: str) -> Claim:
    """The share of the backdoor's maps that are pruned, where the abstracts with that number have it. counted: of every
    run that pruned any."""
    data = counted[(counted.attack == "BadNets") & (counted.defense == METHOD) & (counted.settings == variant)] \
        if len(counted) else NO_ROWS
    check = Check("maps", NOT_RUN, "not run")
    if len(data):
        share = possible(over_groups([data.hits.to_list()]), "asr")     # a share of a whole, as ASR is
        check = Check("maps", _met(above, share, read["value"]) if len(data) >= FEWEST else UNDECIDED,
                      f"{share.mean:.1f}{bounds(share.low, share.high, 1)} % of the maps that the trigger moves most; "
                      f"at random {data.chance.mean():.1f} (runs: {len(data)})",
                      share.mean, share.low, share.high, len(data))
    return claim(
        PAPER, f"maps{ending}",
        f"FMP (as {variant}) removes {read['value']} % of the backdoor's feature maps on CIFAR-10, BadNets.",
        read["source"],
        "How they were counted is not known to us. Here the backdoor's maps are, in each convolution, as many of those "
        f"that the trigger moves most as are pruned there. The 95 % interval over seeds wholly below {read['value']}: "
        "not supported, with this count. Wholly above it, or containing it and no wider than "
        f"{WIDE:.0f} points: supported. Fewer than {FEWEST} runs decide nothing. Written after the runs under "
        "reference/.", [check], tuple(data.run))


def _met(compared_with: Callable[[Interval, float], str], interval: Interval, wanted: float) -> str:
    """Whether a published value is reached: the interval on its better side, or containing it. A wide one contains
    almost any, so it decides nothing; that was added after the first runs and only withholds verdicts."""
    outcome = compared_with(interval, wanted)
    return SUPPORTED if outcome == UNDECIDED and interval.high - interval.low <= WIDE else outcome


def _range(results: Results, table: dict, variant: str, read: dict, ending: str) -> list[Claim]:
    """The least and the largest distance to a baseline."""
    gaps: dict[str, Interval] = {}
    counts: dict[str, int] = {}
    checks = []
    least, most = read["least"]["value"], read["most"]["value"]
    judged = [name for name in BASELINES if name not in LATER]
    for name in judged:
        both = METHOD in table and name in table
        distance = against(results, table[name], table[METHOD], "asr") if both else {"n": 0}
        if not distance["n"]:
            checks.append(Check(name, NOT_RUN, f"{name}: not run"))
            continue
        gap = gaps[name] = Interval(distance["difference"], distance["low"], distance["high"])
        n = counts[name] = distance["n"]
        checks.append(Check(name, above(gap, least) if n >= FEWEST else UNDECIDED,
                            f"{name}: {gap.mean:+.1f} points{bounds(gap.low, gap.high, 1, '+')}, {n} pairs",
                            gap.mean, gap.low, gap.high, n))
    runs = finished(table.get(METHOD), *(table.get(name) for name in judged))
    found = [claim(
        PAPER, f"least-gap{ending}", f"FMP (as {variant}) leaves at least {least} points less ASR than every baseline.",
        read["least"]["source"],
        f"For each baseline (but {' and '.join(LATER)}, which came later): the 95 % interval of its ASR minus FMP's, "
        f"paired by attack and seed, wholly above {least}. Wholly below refutes. Fewer than {FEWEST} pairs decide "
        f"nothing.", checks, runs, of="baselines")]
    if not gaps:
        largest = Check("baselines", NOT_RUN, "not run")
    else:
        name = max(gaps, key=lambda baseline: gaps[baseline].mean)
        gap = gaps[name]
        ruled_out = len(gaps) == len(judged) and all(one.below(most) for one in gaps.values())
        outcome = SUPPORTED if gap.mean >= most else REFUTED if ruled_out else UNDECIDED
        enough = min(counts.values()) >= FEWEST
        largest = Check(name, outcome if enough else UNDECIDED,
                        f"{name}: {gap.mean:+.1f} points{bounds(gap.low, gap.high, 1, '+')}, {counts[name]} pairs",
                        gap.mean, gap.low, gap.high, counts[name])
    found.append(claim(
        PAPER, f"largest-gap{ending}", f"FMP (as {variant}) leaves up to {most} points less ASR than a baseline.",
        read["most"]["source"],
        f"The largest mean distance to such a baseline reaches {most}: supported. Not supported: every baseline ran "
        f"and every interval lies below it. Fewer than {FEWEST} pairs with any baseline decide nothing.",
        [largest], runs))
    return found
