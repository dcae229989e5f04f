"""BadActs' claims: word triggers and feature-space triggers, the trade-off with detection first, and what does it.

The abstract holds no number, so every threshold here is ours, chosen before any run of a defense on real sentences.
"""

import dataclasses
from collections.abc import Callable

import pandas as pd

from reproduce.claims.criteria import (
    ADDS,
    FEWEST,
    MARGIN,
    NOT_RUN,
    ONE_SEED,
    RAISES,
    UNDECIDED,
    Check,
    Claim,
    above,
    adds,
    below,
    claim,
    compared,
    decided,
    erases,
    finished,
    of,
)
from reproduce.protocols.badacts import (
    GENERATED,
    METHOD,
    PAPER,
    RANDOM,
    STATISTICS,
    THEN,
    WORDS,
    detection,
    purification,
)
from reproduce.results import Results
from tables.badacts import STAND_IN, datasets
from tables.comparison import rows
from tables.layout import BEFORE, TOOK, estimate
from tables.render import MISSING

SOURCE = "abstract, arXiv 2405.11227"
OURS = f"{SOURCE}, which claims state of the art without a number; made concrete by us"
CONTROL = "control for the abstract's claim"
SEED_NOTE = ONE_SEED.replace("images", "sentences")
WORD, FEATURE = ("BadNets", "AddSent"), ("StyleBkd", "SynBkd")

# Between two classes guessing gives 50 %, and a model without a backdoor takes one sentence in ten for the other class,
# more often a paraphrase that has lost its meaning: the 20 % asked for among ten classes may be out of reach of a
# perfect defense. Below this a trigger is clearly worse than a coin.
ERASED = 30.0
# 50 is guessing and 100 a perfect detector; what is below this flags a fifth of the clean sentences or more before it
# finds most of the triggered ones.
TELLS = 80.0


def claims(results: Results) -> list[Claim]:
    """The abstract's claims and the controls, over the data sets as they were released, but for the one
    whose validation split is its test split."""
    names = [name for name in datasets(results) if not name.endswith(("-released", f"-{GENERATED}"))]
    purified, detected = (_table(results, names, item) for item in (purification, detection))
    found = [_claim(
        f"erases-{name}", f"BadActs purifies {what}.", SOURCE,
        f"For each attack ({' and '.join(attacks)}) on each data set: ASR before at least {TOOK:.0f} %, and the 95 % "
        f"interval of mean ASR after BadActs (released) wholly below {ERASED:.0f} %. t interval over seeds. "
        f"{SEED_NOTE} Wholly above refutes.", erases(purified, METHOD, _on(purified, attacks), ERASED),
        finished(*(of(purified, defense, attack) for defense in (BEFORE, METHOD)
                   for attack in _on(purified, attacks))))
        for name, what, attacks in (("word-triggers", "triggers of inserted words", WORD),
                                    ("feature-triggers", "triggers in feature space, style and syntax", FEATURE))]
    found.append(_claim(
        "detects-feature-triggers",
        "BadActs' detector tells sentences with a trigger in feature space from clean ones.", CONTROL,
        f"For each attack ({' and '.join(FEATURE)}) on each data set with ASR before at least {TOOK:.0f} %: the 95 % "
        f"interval of mean AUROC wholly above {TELLS:.0f} %. t interval over seeds; with one seed Hanley and McNeil's "
        "over test sentences, which decides nothing. Wholly below refutes.",
        [_tells(detected, attack) for attack in _on(detected, FEATURE)],
        finished(*(of(detected, METHOD, attack) for attack in _on(detected, FEATURE)))))
    found.append(_detection_first(purified))
    against_words = compared(purified, "ACC", METHOD, WORDS, "acc")
    found.append(_claim(
        "keeps-more-than-words", "BadActs keeps more accuracy on clean sentences than purification in word space.",
        OURS, f"ACC of BadActs minus that of {WORDS} on the same victims, working backdoors only, paired by attack, "
        f"data set and seed. {STAND_IN} {RAISES.format(family='this test alone')}", adds([against_words]),
        against_words.runs))
    family = [compared(purified, name, METHOD, control) for name, control in
              (("optimisation", STATISTICS), ("units", RANDOM))]
    statements = {"optimisation": "Optimising BadActs' intervals lowers ASR beyond clamping to mu ± 3 sigma.",
                  "units": "An interval for each unit lowers ASR beyond the same intervals dealt out anew."}
    for one, check in zip(family, adds(family), strict=True):
        found.append(_claim(
            f"{one.subject}-adds", statements[one.subject], CONTROL, f"BadActs minus \"{one.control}\" on the same "
            "victims, working backdoors only, paired by attack, data set and seed. "
            + ADDS.format(family="both controls"), [check], one.runs))
    return found


def _claim(name: str, statement: str, source: str, criterion: str, checks: list[Check],
           runs: tuple[str, ...]) -> Claim:
    checks = checks or [Check("all attacks", NOT_RUN, "not run")]
    return claim(PAPER, name, statement, source, criterion, checks, runs, "checks", "sentences")


def _table(results: Results, names: list[str], item: Callable[[str], str]) -> dict[str, pd.DataFrame]:
    """Rows by defense, released settings; an attack on one of several data sets counts as an attack of its own."""
    parts = []
    for name in names:
        frame = rows(results, PAPER, item(name), "attack", "defense", "variant")
        if len(frame):
            frame = frame[frame.variant.isin(["released", MISSING])]
            parts.append(frame.assign(attack=frame.attack + f", {name}") if len(names) > 1 else frame)
    return dict(iter(pd.concat(parts).groupby("defense", sort=False))) if parts else {}


def _on(table: dict[str, pd.DataFrame], attacks: tuple[str, ...]) -> list[str]:
    """These attacks, on every data set at hand."""
    named = dict.fromkeys(table[BEFORE].attack) if BEFORE in table else ()
    return [name for name in named if name.split(",")[0] in attacks]


def _tells(table: dict[str, pd.DataFrame], attack: str) -> Check:
    """Whether the detector tells an attack's sentences from clean ones."""
    before, value = estimate(of(table, BEFORE, attack), "asr"), estimate(of(table, METHOD, attack), "auroc")
    if not before.n or not value.n:
        return Check(attack, NOT_RUN, f"{attack}: not run")
    took = before.mean >= TOOK
    note = "" if took else "; the attack did not take, so there was nothing to detect"
    return Check(attack, decided(above(value.interval, TELLS), value.n) if took else UNDECIDED,
                 f"{attack}: AUROC {value.mean:.1f} [{value.low:.1f}, {value.high:.1f}], n = {value.n}{note}",
                 value.mean, value.low, value.high, value.n)


def _detection_first(table: dict[str, pd.DataFrame]) -> Claim:
    """More ACC than with every sentence purified, and no more ASR."""
    gained = compared(table, "ACC", THEN, METHOD, "acc")
    paid = compared(table, "ASR", THEN, METHOD)
    if paid.paired:
        interval = paid.interval
        outcome = below(interval, MARGIN) if len(paid.paired) >= FEWEST else UNDECIDED
        cost = Check("ASR", outcome, f"ASR {interval.mean:+.2f} points [{interval.low:+.2f}, "
                     f"{interval.high:+.2f}] against {METHOD}, {len(paid.paired)} pairs",
                     interval.mean, interval.low, interval.high, len(paid.paired))
    else:
        cost = Check("ASR", NOT_RUN, "not run")
    whole = _claim(
        "detection-first", "Purifying only what is flagged gives a better trade-off than purifying every sentence.",
        SOURCE, f"\"{THEN}\" minus \"{METHOD}\" on the same victims, working backdoors only, paired by attack, data "
        f"set and seed. ACC: {RAISES.format(family='this test alone')} ASR: the 95 % interval of the mean "
        f"difference wholly below +{MARGIN:.0f} points; wholly above refutes; fewer than {FEWEST} pairs decide "
        "nothing. Both have to be supported.",
        [*adds([gained]), cost], gained.runs)
    return dataclasses.replace(whole, evidence="; ".join(check.text for check in whole.checks))
