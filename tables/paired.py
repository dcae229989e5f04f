"""Two defenses on the same victims: their paired comparison, over attacks or on each attack by itself, as tables."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from reproduce.results import Results
from reproduce.statistics import ALPHA, holm, paired_t, wilcoxon
from tables.layout import BEFORE, Pair, by_image, counts, differences, over_attacks, pairs, table
from tables.render import MISSING, Table, Value, bounds, heading, probability

OPPOSED = {"defense": "Defense", "settings": "Settings", "control": "Control's"}    # labels and their headings
MEASURES = ("asr", "acc")


def opposed(frame: pd.DataFrame, control: str) -> list[tuple[dict[str, str], pd.DataFrame, pd.DataFrame]]:
    """Each defense beside the control of its comparison: labels as in OPPOSED, its rows, the control's. What is the
    same in two comparisons, settings and control's settings, is here once.

    frame: rows with attack, defense, variant (the comparison's) and settings (the defense's own).
    """
    found: dict[tuple[str, ...], tuple[dict[str, str], pd.DataFrame, pd.DataFrame]] = {}
    for (defense, variant), part in frame[~frame.defense.isin([BEFORE, control])].groupby(["defense", "variant"],
                                                                                         sort=False):
        base = frame[(frame.defense == control) & (frame.variant == variant)]
        labels = {"defense": defense, "settings": part.settings.iloc[0], "control": next(iter(base.settings), MISSING)}
        found.setdefault(tuple(labels.values()), (labels, part, base))
    return list(found.values())


def against_control(results: Results, frame: pd.DataFrame, control: str, weak: Sequence[str], name: str, title: str,
                    sample: str) -> Table:
    """Each defense against one control, paired over (attack, seed). weak: attacks that did not take, whose ASR does not
    count."""
    compared = [{**labels, **against(results, *(one[~one.attack.isin(weak)] if measure == "asr" else one
                                                for one in (part, base)), measure)}
                for labels, part, base in opposed(frame, control) for measure in MEASURES]
    return tested(name, title, _minus(control, weak), compared, OPPOSED, frame, sample=sample)


def by_attack(frame: pd.DataFrame, control: str, weak: Sequence[str], name: str, title: str) -> Table:
    """Each defense against one control on each attack by itself, paired over seeds. weak: as in `against_control`."""
    data = pd.DataFrame([
        {**labels, "attack": attack, "measure": measure,
         **_over_seeds(part[part.attack == attack], base[base.attack == attack], measure)}
        for labels, part, base in opposed(frame, control) for attack in part.attack.unique()
        for measure in MEASURES if measure != "asr" or attack not in weak])
    data = data[data.n > 0].copy() if len(data) else data
    shown = []
    if len(data):
        data["p_holm"] = data.groupby(["attack", "measure"], sort=False).p.transform(lambda p: holm(p.to_list()))
        attacks = [attack for attack in frame.attack.unique() if attack in set(data.attack)]
        for group, part in data.groupby([*OPPOSED, "measure"], sort=False):
            cells = dict.fromkeys(attacks, Value(MISSING)) | {
                row.attack: Value(f"{row.difference:+.1f}{bounds(row.low, row.high, 1, '+')}"
                                  f"{' *' if row.p_holm < ALPHA else ''}", runs=tuple(row.runs.split()))
                for row in part.iloc}
            shown.append({**dict(zip(OPPOSED.values(), group[:-1], strict=True)), "Measure": heading(group[-1]),
                          **cells, "Pairs": Value(counts(part.n.to_list()))})
    return table(name, title,
                 f"{_minus(control, weak)}, in points: mean over seeds with Student's 95 % interval over them; one "
                 "seed has none, nor have equal differences. *: p < 0.05, paired t test over seeds, Holm over the rows "
                 "of one attack and measure. Of two or three seeds an interval is wide, and rests on their being "
                 "spread normally.",
                 pd.DataFrame(shown), data, frame)


def _minus(control: str, weak: Sequence[str]) -> str:
    """What is subtracted from what, in words."""
    return f"Defense minus {control} of the same comparison{', ASR on working backdoors only' if weak else ''}"


def tested(name: str, title: str, compared_is: str, compared: list[dict[str, Any]], labels: dict[str, str],
           source: pd.DataFrame, group: str = "an attack", sample: str = "image") -> Table:
    """A table of paired comparisons. compared_is: what is subtracted from what, in words; compared: for each row its
    labels and the numbers of `against`; labels: their headings; group: what the differences are grouped by."""
    noun = group.split()[-1]
    data = pd.DataFrame(compared)
    data = data[data.n > 0].copy() if len(data) else data
    shown = []
    if len(data):
        data.insert(data.columns.get_loc("p") + 1, "p_holm", holm(data.p.to_list()))
        shown = [{
            **{column: row[key] for key, column in labels.items()}, "Measure": heading(row.measure),
            "Difference": Value(f"{row.difference:+.2f}{bounds(row.low, row.high, 2, '+')}",
                                runs=tuple(row.runs.split())),
            "Pairs": Value(str(row.n)), "p": Value(probability(row.p)), "p (Holm)": Value(probability(row.p_holm)),
            f"{noun.capitalize()}s": Value(str(row.n_attacks)),
            f"p over {noun}s": Value(probability(row.p_attacks)),
            "McNemar lower / higher / pairs": Value(f"{row.mcnemar_lower} / {row.mcnemar_higher} / {row.n}"),
        } for row in data.iloc]
    return table(name, title,
                 f"{compared_is}, in points: mean over {noun}s with Student's 95 % interval over the {noun}s' "
                 f"means, or over the seeds of a single one. p: exact "
                 f"two-sided Wilcoxon signed-rank test over ({noun}, seed) pairs, which takes the seeds of {group} as "
                 f"independent; p over {noun}s: the same on one mean difference per {noun}, not corrected. Below 6 "
                 "non-zero differences p cannot reach 0.05. Holm: over the rows of this table, which is another family "
                 "than that of a claim. McNemar: in how many "
                 f"pairs, test {sample} by test {sample}, the measure is significantly lower or higher (5 %, Holm over "
                 "the pairs of the row).", pd.DataFrame(shown), data,
                 source)


def against(results: Results, part: pd.DataFrame, control: pd.DataFrame, measure: str) -> dict[str, Any]:
    """Paired comparison of one measure: difference in points, Wilcoxon over pairs and over attacks, McNemar counts."""
    paired = pairs(part, control, measure)
    by_attack = differences(paired).values()
    interval = over_attacks(paired, measure)
    test = wilcoxon([pair.difference for pair in paired])
    attacks_test = wilcoxon([sum(values) / len(values) for values in by_attack])
    single = [by_image(results, pair, measure) for pair in paired]
    significant = [p < ALPHA for p in holm([result.p for result in single])]
    lower = sum(s and result.only_first < result.only_second for s, result in zip(significant, single, strict=True))
    return {"measure": measure, "n": len(paired), "n_attacks": len(by_attack), "difference": interval.mean,
            "low": interval.low, "high": interval.high, "p": test.p, "p_attacks": attacks_test.p,
            "mcnemar_lower": lower, "mcnemar_higher": sum(significant) - lower, "runs": _runs(paired)}


def _over_seeds(part: pd.DataFrame, control: pd.DataFrame, measure: str) -> dict[str, Any]:
    """One attack's paired comparison of one measure: difference in points, its interval over seeds, paired t test."""
    paired = pairs(part, control, measure)
    interval = over_attacks(paired, measure)
    equal = interval.low == interval.high   # as counts may be by chance, which is no precision
    return {"n": len(paired), "difference": interval.mean, "low": math.nan if equal else interval.low,
            "high": math.nan if equal else interval.high,
            "p": paired_t([pair.difference for pair in paired]).p, "runs": _runs(paired)}


def _runs(paired: Sequence[Pair]) -> str:
    """The names of the runs behind pairs: all first ones, then all second ones."""
    return " ".join([pair.run_first for pair in paired] + [pair.run_second for pair in paired])
