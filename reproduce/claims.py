"""Each paper's headline claims as checks on results, with thresholds written down before any run of a defense.

Verdicts: supported, not supported, inconclusive (the interval straddles the threshold, or runs are missing), not run.
At smoke scale a check is computed all the same, to exercise the code, but the verdict says nothing about the paper.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from reproduce.protocols import PAPERS, Profile
from reproduce.results import Results
from reproduce.statistics import (
    ALPHA,
    Interval,
    PairedTest,
    hierarchical_bootstrap,
    holm,
    paired_difference,
    t_interval,
    wilcoxon,
)
from tables import nad
from tables.layout import BEFORE, TOOK, Pair, differences, estimate, outcomes, pairs, present, victims_asr
from tables.render import is_smoke

SUPPORTED, REFUTED, UNDECIDED, NOT_RUN = "supported", "not supported", "inconclusive", "not run"
NO_VERDICT = "smoke scale: no verdict on the paper"

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

ONE_SEED = "With one seed the interval covers the test images only."

SIX = ("BadNets", "Trojan", "Blend", "CL", "SIG", "Refool")


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


def claims(results: Results, profile: Profile) -> list[Claim]:
    """The claims of every paper that has entries, in the papers' order."""
    papers = {entry.paper for entry in results.entries}
    return [_scaled(claim, profile) for paper, build in CLAIMS.items() if paper in papers for claim in build(results)]


def write(found: Sequence[Claim], path: Path) -> None:
    """claims.json; NaN becomes null."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    path.write_text(json.dumps([plain(dataclasses.asdict(claim)) for claim in found], indent=1) + "\n",
                    encoding="utf-8")


def _scaled(claim: Claim, profile: Profile) -> Claim:
    """The claim with a verdict fit for the profile's scale."""
    if is_smoke(profile):
        return dataclasses.replace(claim, verdict=claim.outcome if claim.outcome == NOT_RUN else NO_VERDICT,
                                   scale="smoke scale")
    if profile.victim_epochs or profile.defense_epochs:
        return dataclasses.replace(claim, scale="shortened protocol")
    return dataclasses.replace(claim, scale="exact protocol")


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


# ---------------------------------------------------------------- NAD

def _nad(results: Results) -> list[Claim]:
    found = [claim for variant in nad.VARIANTS for claim in (_erases(results, variant), _harmless(results, variant))]
    return [*found, *_distillation(results), _augmentation(results)]


def _main(results: Results, variant: str) -> dict[str, pd.DataFrame]:
    """Rows of the main table by defense; empty without such entries."""
    if not present(results, nad.PAPER, "main"):
        return {}
    return dict(iter(nad.main_rows(results, "main", variant).groupby("defense", sort=False)))


def _of(rows: dict[str, pd.DataFrame], defense: str, attack: str) -> pd.DataFrame | None:
    part = rows.get(defense)
    return None if part is None else part[part.attack == attack]


def _erases(results: Results, variant: str) -> Claim:
    rows = _main(results, variant)
    checks = []
    for attack in SIX:
        before, after = _of(rows, BEFORE, attack), _of(rows, "NAD", attack)
        if after is None or before is None or not (value := estimate(after, "asr")).n:
            checks.append(Check(attack, NOT_RUN, f"{attack}: not run"))
            continue
        taken = estimate(before, "asr").mean
        outcome = below(value.interval, ERASED) if taken >= TOOK else UNDECIDED
        note = "" if taken >= TOOK else "; the attack did not take, so there was nothing to erase"
        checks.append(Check(attack, outcome, f"{attack}: ASR {taken:.1f} -> {value.mean:.1f} "
                            f"[{value.low:.1f}, {value.high:.1f}], n = {value.n}{note}",
                            value.mean, value.low, value.high, value.n))
    return _claim(f"erases-six-attacks-{variant}", f"NAD ({variant} settings) erases six attacks with 5 % clean data.",
                  nad.published_values()["claims"]["erases"]["source"],
                  f"For each of the six attacks: ASR before at least {TOOK:.0f} %, and the 95 % interval of mean ASR "
                  f"after NAD wholly below {ERASED:.0f} % (twice random guessing among ten classes). t interval over "
                  f"seeds. {ONE_SEED} Wholly above refutes.", checks, _runs(rows.get(BEFORE), rows.get("NAD")))


def _harmless(results: Results, variant: str) -> Claim:
    rows = _main(results, variant)
    checks = []
    for attack in SIX:
        before, after = _of(rows, BEFORE, attack), _of(rows, "NAD", attack)
        paired = pairs(before, after, "acc") if after is not None and before is not None else []
        if not paired:
            checks.append(Check(attack, NOT_RUN, f"{attack}: not run"))
            continue
        drop = _drop(results, paired)
        checks.append(Check(attack, below(drop, OBVIOUS_LOSS), f"{attack}: {drop.mean:+.1f} points lost "
                            f"[{drop.low:+.1f}, {drop.high:+.1f}], n = {len(paired)}", drop.mean, drop.low, drop.high,
                            len(paired)))
    return _claim(f"no-obvious-loss-{variant}",
                  f"NAD ({variant} settings) has no obvious loss of accuracy on clean examples.",
                  nad.published_values()["claims"]["erases"]["source"],
                  "For each of the six attacks: the 95 % interval of the mean ACC lost (before minus after NAD, paired "
                  f"by seed, all clean test images) wholly below {OBVIOUS_LOSS:.0f} points; the authors' README shows "
                  f"a loss of 3.53 points as a success. t interval over seeds. {ONE_SEED} Wholly above refutes.",
                  checks, _runs(rows.get(BEFORE), rows.get("NAD")))


def _drop(results: Results, paired: list[Pair]) -> Interval:
    if len(paired) > 1:
        return t_interval([pair.difference for pair in paired])
    pair = paired[0]
    return paired_difference(outcomes(results, pair.run_first, "acc"), outcomes(results, pair.run_second, "acc"))


def _distillation(results: Results) -> list[Claim]:
    """The control for both variants; their p-values are one family."""
    compared = []
    for variant in nad.VARIANTS:
        rows = _main(results, variant)
        working = [] if BEFORE not in rows else [a for a, asr in victims_asr(rows[BEFORE]).items() if asr >= TOOK]
        paired = [pair for pair in pairs(rows["NAD"], rows[nad.CONTROL], "asr") if pair.attack in working] \
            if "NAD" in rows and nad.CONTROL in rows else []
        compared.append((variant, paired, hierarchical_bootstrap(list(differences(paired).values())),
                         wilcoxon([pair.difference for pair in paired])))
    adjusted = holm([test.p for *_, test in compared])
    return [_control(variant, paired, interval, test, p)
            for (variant, paired, interval, test), p in zip(compared, adjusted, strict=True)]


def _control(variant: str, paired: list[Pair], interval: Interval, test: PairedTest, p: float) -> Claim:
    if not paired:
        outcome, text = NOT_RUN, "not run"
    else:
        gained = p < ALPHA and interval.below(0.0)
        refuted = len(paired) >= FEWEST and interval.above(-MARGIN)
        outcome = SUPPORTED if gained else REFUTED if refuted else UNDECIDED
        note = f"; {test.note}" if test.note else ""
        shown = "-" if math.isnan(p) else f"{p:.3g}"
        text = (f"ASR {interval.mean:+.2f} points [{interval.low:+.2f}, {interval.high:+.2f}] against beta = 0, "
                f"Wilcoxon p (Holm) = {shown}, {len(paired)} (attack, seed) pairs{note}")
    check = Check(variant, outcome, text, interval.mean, interval.low, interval.high, len(paired), p)
    return _claim(f"distillation-adds-{variant}", f"NAD's distillation term ({variant} settings) lowers ASR beyond "
                  "fine-tuning on the same schedule.",
                  f"control for the abstract's claim; {nad.published_values()['claims']['control']['source']} observes "
                  "the contrary", "NAD minus NAD (beta = 0) on the same victims, working backdoors only, paired by "
                  "attack and seed. Supported: exact Wilcoxon signed-rank p < 0.05 (Holm over both settings) and the "
                  "hierarchical bootstrap interval of the mean difference below 0; its size is given. Not supported: "
                  f"that interval wholly above -{MARGIN:.0f} points, so any gain is smaller than that. Fewer than "
                  f"{FEWEST} pairs decide nothing.", [check],
                  tuple(name for pair in paired for name in (pair.run_first, pair.run_second)))


def _augmentation(results: Results) -> Claim:
    values = nad.published_values()["claims"]["augmentation"]
    parts: dict[str, pd.DataFrame] = {}
    if present(results, nad.PAPER, "augmentation"):
        frame = nad.rows(results, "augmentation", "victim", "defense")
        parts = dict(iter(frame[frame.defense != BEFORE].groupby("victim", sort=False)))
    by_seed: dict[int, list[float]] = {}
    used: list[str] = []
    if len(parts) == 2:
        plain, augmented = parts.values()
        for defense in plain.defense.unique():
            ours, theirs = augmented[augmented.defense == defense], plain[plain.defense == defense]
            seeds = dict(zip(ours.run, ours.seed, strict=True))
            for pair in pairs(ours, theirs, "asr"):
                by_seed.setdefault(seeds[pair.run_first], []).append(pair.difference)
                used += [pair.run_first, pair.run_second]
    means = [sum(values) / len(values) for values in by_seed.values()]
    interval, test = t_interval(means), wilcoxon(means)
    if not means:
        outcome, text = NOT_RUN, "not run"
    else:
        outcome = SUPPORTED if interval.above(0.0) else REFUTED if interval.below(MARGIN) else UNDECIDED
        bounds = "" if math.isnan(interval.low) else f" [{interval.low:+.2f}, {interval.high:+.2f}]"
        text = f"ASR after FT, NAD (beta = 0) and NAD {interval.mean:+.2f} points{bounds}, n = {len(means)} seeds"
    check = Check("BadNets", outcome, text, interval.mean, interval.low, interval.high, len(means), test.p)
    return _claim("augmentation-makes-erasure-harder",
                  "A victim trained with standard augmentation is harder to erase.", values["source"],
                  "ASR after a defense on the augmented victim minus that on the victim as released, BadNets, mean "
                  "over FT, NAD (beta = 0) and NAD, one value per seed. Supported: 95 % t interval over seeds above 0. "
                  f"Not supported: wholly below +{MARGIN:.0f} points. One seed decides nothing.", [check], tuple(used))


def _claim(name: str, statement: str, source: str, criterion: str, checks: list[Check],
           runs: tuple[str, ...]) -> Claim:
    outcome = combine(checks)
    if len(checks) == 1:
        evidence = checks[0].text
    else:
        kinds = [check.outcome for check in checks]
        counted = (f"{kinds.count(kind)} {kind}" for kind in (SUPPORTED, REFUTED, UNDECIDED, NOT_RUN) if kind in kinds)
        evidence = f"{'; '.join(counted)}, of {len(checks)} attacks"
    if any(check.n == 1 and not math.isnan(check.low) for check in checks):
        evidence += " (one seed: the interval covers test images, not training)"
    return Claim(PAPERS["nad"], name, statement, source, criterion, outcome, outcome, "", evidence, tuple(checks), runs)


def _runs(*frames: pd.DataFrame | None) -> tuple[str, ...]:
    return tuple(name for frame in frames if frame is not None for name in frame[frame.status == "done"].run)


CLAIMS: dict[str, Callable[[Results], list[Claim]]] = {"nad": _nad}
