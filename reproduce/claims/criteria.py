"""The criteria that claims are checked by. Thresholds were written down before any run of a defense; which claims came
when some of their runs were known is said in their criterion."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from reproduce.protocols import PAPERS
from reproduce.results import MEASURES, Results
from reproduce.statistics import ALPHA, Interval, PairedTest, holm, least, wilcoxon
from tables.comparison import Study, main_rows
from tables.layout import (
    BEFORE,
    LOWER,
    TOOK,
    Pair,
    estimate,
    mean_difference,
    over_attacks,
    pairs,
    present,
    victims_asr,
)
from tables.render import bounds, heading

SUPPORTED, REFUTED, UNDECIDED, NOT_RUN = "supported", "not supported", "inconclusive", "not run"

# Without a backdoor a triggered image is called the target about as often as any wrong class, 1 to 3 %; guessing among
# ten classes gives 10 %. Twice that is what we still call erased: below, a trigger is no longer a reliable weapon.
ERASED = 20.0
# The authors show 85.65 -> 82.12 in their README as a success, so 3.5 points is no obvious loss to them. The next whole
# step above it; a stricter reader finds every drop in the checks (MCLDef's abstract, for one, asks for 2 points).
OBVIOUS_LOSS = 5.0
# A gain below this would not decide between two defenses: it is within the spread of one method over seeds.
MARGIN = 2.0

# The fewest pairs with which a two-sided Wilcoxon test can reach 0.05; the other verdict is not given on fewer either.
# Added after the first real runs (three pairs); it only withholds verdicts.
FEWEST = 6

# Added later, too, for the same reason: another training of the same victim may come out otherwise.
ONE_SEED = "With one seed the interval covers the test images only and decides nothing."

NO_ROWS = pd.DataFrame(columns=["attack", "seed", "run", "status", *MEASURES])

SIX = ("BadNets", "Trojan", "Blend", "CL", "SIG", "Refool")    # of NAD and ARGD


@dataclass(frozen=True)
class Check:
    """One attack's or one comparison's part of a claim. low, high: 95 % interval of value (percent or points)."""

    subject: str
    outcome: str
    text: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    p: float = math.nan


@dataclass(frozen=True)
class Claim:
    """outcome: what the criterion gives on these runs. verdict: what may be said about the paper at this scale."""

    paper: str
    name: str
    statement: str
    source: str
    criterion: str
    outcome: str
    verdict: str
    scale: str
    evidence: str
    checks: tuple[Check, ...]
    runs: tuple[str, ...]


def about(results: Results, paper: str, items: dict[str, Callable[[Results], list[Claim]]]) -> list[Claim]:
    """The claims about those of a paper's items that the entries include."""
    return [claim for item, build in items.items() if present(results, paper, item) for claim in build(results)]


def combine(checks: Sequence[Check]) -> str:
    """One failing part refutes the whole; the whole is supported only if every part is."""
    found = {check.outcome for check in checks}
    if found <= {NOT_RUN}:
        return NOT_RUN
    if REFUTED in found:
        return REFUTED
    return SUPPORTED if found == {SUPPORTED} else UNDECIDED


def below(interval: Interval, threshold: float) -> str:
    """Supported if the whole interval lies below the threshold, not supported if above it."""
    if interval.below(threshold):
        return SUPPORTED
    return REFUTED if interval.above(threshold) else UNDECIDED


def decided(outcome: str, seeds: int) -> str:
    """The outcome of an interval over `seeds`; of one seed there is none (see ONE_SEED)."""
    return outcome if seeds > 1 else UNDECIDED


def defenses(results: Results, study: Study, variant: str, item: str = "main") -> dict[str, pd.DataFrame]:
    """Rows of an item like the main table by defense; empty without any in this variant."""
    return dict(iter(main_rows(results, study, item, variant).groupby("defense", sort=False)))


def above(interval: Interval, threshold: float) -> str:
    """Supported if the whole interval lies above the threshold, not supported if below it."""
    if interval.above(threshold):
        return SUPPORTED
    return REFUTED if interval.below(threshold) else UNDECIDED


def erases(rows: dict[str, pd.DataFrame], defense: str, attacks: Sequence[str],
           threshold: float = ERASED) -> list[Check]:
    """Per attack: a working backdoor before, and the interval of ASR after wholly below `threshold`."""
    checks = []
    for attack in attacks:
        before, after = (estimate(part, "asr") for part in (of(rows, BEFORE, attack), of(rows, defense, attack)))
        if not before.n or not after.n:
            checks.append(Check(attack, NOT_RUN, f"{attack}: not run"))
            continue
        taken, value = before.mean, after
        outcome = decided(below(value.interval, threshold), value.n) if taken >= TOOK else UNDECIDED
        note = "" if taken >= TOOK else "; the attack did not take, so there was nothing to erase"
        excess = estimate(of(rows, defense, attack), "excess")
        checks.append(Check(attack, outcome, f"{attack}: ASR {taken:.1f} -> {value.mean:.1f} "
                            f"[{value.low:.1f}, {value.high:.1f}], excess {excess.mean:.1f}"
                            f"{bounds(excess.low, excess.high, 1)}, n = {value.n}{note}",
                            value.mean, value.low, value.high, value.n))
    return checks


def loses_less(results: Results, rows: dict[str, pd.DataFrame], defense: str, attacks: Sequence[str],
               threshold: float, measure: str = "acc") -> list[Check]:
    """Per attack: the interval of the accuracy lost by the defense wholly below `threshold` points."""
    checks = []
    for attack in attacks:
        paired = pairs(of(rows, BEFORE, attack), of(rows, defense, attack), measure)
        if not paired:
            checks.append(Check(attack, NOT_RUN, f"{attack}: not run"))
            continue
        drop = mean_difference(results, paired, measure)
        checks.append(Check(attack, decided(below(drop, threshold), len(paired)),
                            f"{attack}: {drop.mean:+.1f} points lost [{drop.low:+.1f}, {drop.high:+.1f}], "
                            f"n = {len(paired)}", drop.mean, drop.low, drop.high, len(paired)))
    return checks


def of(rows: dict[str, pd.DataFrame], defense: str, attack: str) -> pd.DataFrame:
    """A defense's rows on one attack; empty without any."""
    part = rows.get(defense, NO_ROWS)
    return part[part.attack == attack]


# The interval is `over_groups`. Until it was known how narrow a bootstrap of a few attacks is, it was one; the change
# came after the first real runs and, intervals being wider, withholds verdicts.
def _gain(better: str, worse: str, margin: float) -> str:
    return ("Supported: exact Wilcoxon signed-rank p < 0.05 (Holm over {family}) and the 95 % interval "
            f"of the mean difference {better} 0; its size is given. Not supported: that interval not wholly {better} 0 "
            f"and wholly {worse} {margin:+.0f} points, so any gain is smaller than that. Fewer than {FEWEST} pairs "
            "decide nothing.")


ADDS = _gain("below", "above", -MARGIN)     # of measures that are better when lower
RAISES = _gain("above", "below", MARGIN)    # of the others


@dataclass(frozen=True)
class Compared:
    """A defense against a control in one measure, paired by attack and seed, on backdoors that work."""

    subject: str
    control: str
    paired: list[Pair]
    interval: Interval
    test: PairedTest
    measure: str = "asr"
    excess: Interval | None = None      # the same of excess ASR, which no verdict is taken from

    @property
    def runs(self) -> tuple[str, ...]:
        return tuple(name for pair in self.paired for name in (pair.run_first, pair.run_second))


def compared(rows: dict[str, pd.DataFrame], subject: str, defense: str, control: str,
             measure: str = "asr") -> Compared:
    """`defense` against `control`; subject: what the check is called."""
    working = [] if BEFORE not in rows else [a for a, asr in victims_asr(rows[BEFORE]).items() if asr >= TOOK]

    def found(of: str) -> list[Pair]:
        return [pair for pair in pairs(rows[defense], rows[control], of) if pair.attack in working] \
            if defense in rows and control in rows else []

    paired = found(measure)
    return Compared(subject, control, paired, over_attacks(paired, measure),
                    wilcoxon([pair.difference for pair in paired]), measure,
                    over_attacks(found("excess"), "excess") if measure == "asr" else None)


def adds(family: Sequence[Compared]) -> list[Check]:
    """Whether each defense lowers ASR beyond its control (see ADDS), or raises another measure (see RAISES); the
    p-values are one family."""
    tested = [one.test.n for one in family if not math.isnan(one.test.p)]
    floor = least(max(tested, default=0), len(tested))
    adjusted = holm([one.test.p for one in family])
    return [_adds(one, p, floor) for one, p in zip(family, adjusted, strict=True)]


def _adds(one: Compared, p: float, floor: float) -> Check:
    """floor: what p cannot fall below in this family."""
    interval = one.interval
    if not one.paired:
        return Check(one.subject, NOT_RUN, "not run", p=p)
    lower = one.measure in LOWER
    better = interval.below(0.0) if lower else interval.above(0.0)
    gained = p < ALPHA and better
    refuted = len(one.paired) >= FEWEST and not better and (
        interval.above(-MARGIN) if lower else interval.below(MARGIN))
    zeros = len(one.paired) - one.test.n
    note = f", {zeros} of them equal" if zeros else ""
    note += f"; p cannot fall below {floor:.3g} here" if floor >= ALPHA else ""
    note += f"; excess ASR {one.excess.mean:+.2f}{bounds(one.excess.low, one.excess.high, 2, '+')}" \
        if one.excess else ""
    shown = "-" if math.isnan(p) else f"{p:.3g}"
    return Check(one.subject, SUPPORTED if gained else REFUTED if refuted else UNDECIDED,
                 f"{heading(one.measure)} {interval.mean:+.2f} points"
                 f"{bounds(interval.low, interval.high, 2, '+')} against {one.control}, "
                 f"Wilcoxon p (Holm) = {shown}, {len(one.paired)} pairs{note}",
                 interval.mean, interval.low, interval.high, len(one.paired), p)


def controls(paper: str, method: str, family: Sequence[Compared], statements: dict[str, str], called: str,
             on: str = "the same victims, working backdoors only, paired by attack and seed",
             written: str = "") -> list[Claim]:
    """Whether `method` does better than each control of the family. statements: by the comparisons' subjects; called:
    the family, on: the victims, written: when that was asked, in the criterion."""
    return [claim(paper, f"{one.subject}-adds", statements[one.subject], "control for the abstract's claim",
                  f"{method} minus \"{one.control}\" on {on}. {ADDS.format(family=called)}{written}", [check], one.runs)
            for one, check in zip(family, adds(family), strict=True)]


def on_authors_victim(results: Results, study: Study, variant: str, comparisons: Sequence[tuple[str, str]],
                      written: str, told: str = "") -> list[Claim]:
    """Whether each (defense, control) shows what it should on the one checkpoint that the authors published. written:
    when that was asked; told: what the defense knows and the control does not."""
    rows = defenses(results, study, variant, "authors-victim")
    family = [compared(rows, f"{defense} against {control}", defense, control) for defense, control in comparisons]
    return [claim(study.paper, f"authors-victim-{number}",
                  f"On the checkpoint its authors published, {defense}{told} leaves less ASR than {control}.",
                  "control for the abstract's claims",
                  f"{defense} minus {control} on that one checkpoint, paired by seed, which fixes the clean subset and "
                  "what the defenses draw: nothing is said of other victims. "
                  + ADDS.format(family=f"the paper's {len(family)} such controls") + f" {written}", [check], one.runs)
            for number, ((defense, control), one, check) in enumerate(
                zip(comparisons, family, adds(family), strict=True), 1)]


def up_to(results: Results, rows: dict[str, pd.DataFrame], defense: str, base: str, measure: str, wanted: float,
          attacks: Sequence[str]) -> Check:
    """"Up to `wanted` %" less ASR or more ACC than `base`, on the attacks that took: the largest gain over them, as a
    share of the base's value on the same seeds and in points.

    Supported if either reaches `wanted`; not supported if all `attacks` ran, neither does, and every interval, in
    points and as a share, lies below it. Both on FEWEST seeds.
    """
    working = [a for a, asr in victims_asr(rows[BEFORE]).items() if asr >= TOOK] if BEFORE in rows else []
    gains: dict[str, Interval] = {}
    shares: dict[str, Interval] = {}
    seeds: list[int] = []
    for attack in working:
        theirs, ours = of(rows, base, attack), of(rows, defense, attack)
        paired = pairs(theirs, ours, measure) if measure == "asr" else pairs(ours, theirs, measure)
        if paired:
            gain = mean_difference(results, paired, measure)
            values = [pair.first if measure == "asr" else pair.second for pair in paired]
            if measure == "asr":    # none can lose more than the base leaves
                gain = Interval(gain.mean, gain.low, min(gain.high, sum(values) / len(values)))
            gains[attack] = gain
            unit = 100 * len(values) / sum(values) if any(values) else math.nan
            shares[attack] = Interval(unit * gain.mean, unit * gain.low, unit * gain.high)
            seeds.append(len(paired))
    if not gains:
        return Check("all attacks", NOT_RUN, "not run")
    first, second = max(shares, key=lambda a: shares[a].mean), max(gains, key=lambda a: gains[a].mean)
    share, points, n = shares[first], gains[second], min(seeds)
    reached = share.mean >= wanted or points.mean >= wanted
    ruled_out = set(gains) == set(attacks) and not reached and all(
        gain.below(wanted) for gain in (*gains.values(), *shares.values()))
    outcome = SUPPORTED if reached else REFUTED if ruled_out else UNDECIDED
    what = "less ASR" if measure == "asr" else "more ACC"
    return Check("all attacks", outcome if n >= FEWEST else UNDECIDED,
                 f"at most {share.mean:.1f} % {what}{bounds(share.low, share.high, 1)} ({first}), and "
                 f"{points.mean:+.2f} points {bounds(points.low, points.high, 2, '+').strip()} ({second}); "
                 f"{len(gains)} attacks, n = {n}", points.mean, points.low, points.high, n)


def claim(paper: str, name: str, statement: str, source: str, criterion: str, checks: Sequence[Check],
          runs: tuple[str, ...], of: str = "attacks", sample: str = "images") -> Claim:
    """A claim whose outcome is its checks' combined. of: what the checks are; sample: what a test set consists of."""
    outcome = combine(checks)
    if len(checks) == 1:
        evidence = checks[0].text
    else:
        kinds = [check.outcome for check in checks]
        counted = (f"{kinds.count(kind)} {kind}" for kind in (SUPPORTED, REFUTED, UNDECIDED, NOT_RUN) if kind in kinds)
        evidence = f"{'; '.join(counted)}, of {len(checks)} {of}"
    if any(check.n == 1 and not math.isnan(check.low) for check in checks):
        evidence += f" (one seed: the interval covers test {sample}, not training)"
    return Claim(PAPERS[paper], name, statement, source, criterion, outcome, outcome, "", evidence, tuple(checks), runs)


def finished(*frames: pd.DataFrame | None) -> tuple[str, ...]:
    """Names of the finished runs."""
    return tuple(name for frame in frames if frame is not None for name in frame[frame.status == "done"].run)
