"""What the tables of several papers share: a paper's defenses on its attacks, one factor varied, cost."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from reproduce.results import Results
from reproduce.statistics import ALPHA, holm, paired_t, wilcoxon
from tables.layout import (
    BEFORE,
    PERCENT,
    attack_grid,
    averages,
    by_image,
    counts,
    defense_grid,
    differences,
    estimates,
    listing,
    measured,
    not_taken,
    over_attacks,
    pairs,
    present,
    printed,
    table,
)
from tables.render import MISSING, Table, Value, heading

AUTHORS_VICTIM = "the checkpoint its authors published"


@dataclass(frozen=True)
class Study:
    """A paper's comparison; its entries are labelled attack, defense and variant (a victim has no variant).

    controls: rows that the other defenses are tested against, e.g. the method without its own term; plain fine-tuning.
    main: {(item, variant): (table name, title)} of the attack grids, in the report's order.
    attacks: {item: which attacks it holds, in words}.
    tall: too many defenses to stand side by side: a table per measure of `grid`, a row per defense.
    sample: what a test set consists of. measures: how the paper calls its measures, said where all are shown.
    """

    paper: str
    name: str
    controls: tuple[str, ...]
    main: dict[tuple[str, str], tuple[str, str]]
    attacks: dict[str, str]
    tall: bool = False
    grid: tuple[str, ...] = ("asr", "acc")
    sample: str = "image"
    measures: str = "ACC non-target is {name}'s own accuracy: without the target class."

    @property
    def items(self) -> list[str]:
        return list(dict.fromkeys(item for item, _variant in self.main))

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(variant for _item, variant in self.main))


def if_present(results: Results, paper: str, item: str, build: Callable[[], Table]) -> list[Table]:
    """The table, where the protocol entries at hand include the item."""
    return [build()] if present(results, paper, item) else []


def rows(results: Results, paper: str, item: str, *keys: str) -> pd.DataFrame:
    """The results frame of an item; a label that some entries lack (a victim has no variant) reads "-"."""
    frame = results.frame(paper, item)
    for key in keys:
        frame[key] = frame[key].fillna(MISSING) if key in frame else MISSING
    return frame


def defense_rows(results: Results, paper: str, item: str, *keys: str) -> pd.DataFrame:
    """The results frame of an item by attack (or the labels given), defense and the settings it has, which may be those
    of another variant than the comparison's; what stands in several comparisons is here once."""
    by = [*(keys or ("attack",)), "defense", "settings"]
    return rows(results, paper, item, *by).drop_duplicates([*by, "run"])


def main_rows(results: Results, study: Study, item: str, variant: str) -> pd.DataFrame:
    """Victims, and the defenses in one variant, of an item with an attack grid."""
    frame = rows(results, study.paper, item, "attack", "defense", "variant")
    frame = frame[frame.variant.isin([variant, MISSING])]
    # Victims alone are no comparison.
    return frame if (frame.variant == variant).any() else frame.iloc[:0]


def grids(results: Results, study: Study) -> list[Table]:
    """ASR and ACC per attack and defense."""
    built = []
    for (item, variant), (name, title) in study.main.items():
        if not present(results, study.paper, item):
            continue
        frame = main_rows(results, study, item, variant)
        title = f"{study.name}: {title}"
        caption = f"ASR on triggered non-target test {study.sample}s and ACC on all clean test {study.sample}s."
        if study.tall:
            built += [defense_grid(results, frame, measure, name=f"{name}{f'-{measure}' if i else ''}", title=title,
                                   caption=caption)
                      for i, measure in enumerate(study.grid)]
        else:
            built.append(attack_grid(results, frame, name=name, title=title, caption=caption))
    return built


def details(results: Results, study: Study) -> list[Table]:
    """Behind the grids: every measure, averages over attacks, tests against the controls."""
    built = []
    for item in study.items:
        if present(results, study.paper, item):
            built += [complete(results, study, item), mean_over_attacks(results, study, item)]
            built += [significance(results, study, item, control) for control in study.controls]
            built += [table for control in study.controls for table in attack_by_attack(results, study, item, control)]
    return built


def authors_victim(results: Results, study: Study) -> list[Table]:
    """The defenses on the checkpoint that the paper's authors published, and tests against the controls."""
    item = "authors-victim"

    def measures() -> Table:
        frame = defense_rows(results, study.paper, item)
        return listing(results, frame, {"defense": "Defense", "settings": "Settings"}, name=item,
                       title=f"{study.name}: the defenses on {AUTHORS_VICTIM}",
                       caption="BadNets. The victim is one file for all seeds; a seed fixes the clean subset and what "
                               "the defenses draw, so the spread is theirs and says nothing of other victims.")

    built = if_present(results, study.paper, item, measures)
    for control in study.controls:
        built += if_present(results, study.paper, item, lambda c=control: significance(results, study, item, c))
    return built


def complete(results: Results, study: Study, item: str) -> Table:
    """Every measure of every attack, defense and variant."""
    frame = defense_rows(results, study.paper, item)
    weak = not_taken(frame)
    flagged = f" The attack did not take: {', '.join(weak)}." if weak else ""
    return listing(results, frame, {"attack": "Attack", "defense": "Defense", "settings": "Settings"},
                   name=f"{item}-complete", title=f"{study.name}: every measure, {study.attacks[item]}",
                   within=["attack"],
                   caption=f"{study.measures.format(name=study.name)}{flagged}")


def mean_over_attacks(results: Results, study: Study, item: str) -> Table:
    """Averages with intervals that cover both other seeds and other attacks, per variant of the defenses."""
    measures = ("asr", "acc", "acc_nontarget", "ra")
    frames = {variant: main_rows(results, study, item, variant) for variant in study.variants}
    parts = [averages(frame, ["defense"], measures).assign(settings=variant) for variant, frame in frames.items()]
    data = pd.concat([part for part in parts if len(part)] or [pd.DataFrame()], ignore_index=True)
    shown = []
    if len(data):
        for (which, settings, defense), part in data.groupby(["attacks", "settings", "defense"], sort=False):
            cells = {heading(row.measure): Value(f"{row['mean']:.2f}{bounds(row.low, row.high, 2)}",
                                                 runs=tuple(row.runs.split())) for row in part.iloc}
            first = part.iloc[0]
            shown.append({"Attacks": f"{which} ({first.n_attacks})", "Comparison": settings, "Defense": defense,
                          **cells, "Runs": Value(str(first.n))})
    return table(f"{item}-averages", f"{study.name}: averages over attacks, {study.attacks[item]}",
                 "Percent: mean over attacks of the mean over seeds, with Student's 95 % interval over the attacks, "
                 "or over the seeds of a single one. Only (attack, seed) pairs finished for every defense of the block "
                 "count; defenses that miss half of them are left out.", pd.DataFrame(shown), data,
                 pd.concat(frames.values()))


def significance(results: Results, study: Study, item: str, control: str) -> Table:
    """Each defense against one control, paired over (attack, seed)."""
    frame = rows(results, study.paper, item, "attack", "defense", "variant", "settings")
    weak = not_taken(frame)
    compared = [{**labels, **against(results, *(one[~one.attack.isin(weak)] if measure == "asr" else one
                                                for one in (part, base)), measure)}
                for labels, part, base in _opposed(frame, control) for measure in ("asr", "acc")]
    return tested(f"{item}-significance{_number(study, control)}",
                  f"{study.name}: each defense against {control}, {study.attacks.get(item, f'on {AUTHORS_VICTIM}')}",
                  f"Defense minus {control} of the same comparison{', ASR on working backdoors only' if weak else ''}",
                  compared, OPPOSED, frame, sample=study.sample)


def attack_by_attack(results: Results, study: Study, item: str, control: str) -> list[Table]:
    """Each defense against one control on each attack by itself, paired over seeds; nothing where one seed is asked
    for, of which an interval says too little."""
    frame = rows(results, study.paper, item, "attack", "defense", "variant", "settings")
    if frame.seed.nunique() < 2:
        return []
    weak = not_taken(frame)
    data = pd.DataFrame([
        {**labels, "attack": attack, "measure": measure, **_over_seeds(part[part.attack == attack],
                                                                       base[base.attack == attack], measure)}
        for labels, part, base in _opposed(frame, control) for attack in part.attack.unique()
        for measure in ("asr", "acc") if measure != "asr" or attack not in weak])
    data = data[data.n > 0].copy() if len(data) else data
    shown = []
    if len(data):
        data["p_holm"] = data.groupby(["attack", "measure"], sort=False).p.transform(lambda p: holm(p.to_list()))
        for group, part in data.groupby([*OPPOSED, "measure"], sort=False):
            cells = {attack: Value(MISSING) for attack in frame.attack.unique() if attack in set(data.attack)} | {
                row.attack: Value(f"{row.difference:+.1f}{bounds(row.low, row.high, 1, '+')}"
                                  f"{' *' if row.p_holm < ALPHA else ''}", runs=tuple(row.runs.split()))
                for row in part.iloc}
            shown.append({**dict(zip(OPPOSED.values(), group[:-1], strict=True)), "Measure": heading(group[-1]),
                          **cells, "Pairs": Value(counts(part.n.to_list()))})
    return [table(f"{item}-by-attack{_number(study, control)}",
                  f"{study.name}: each defense against {control}, attack by attack",
                  f"Defense minus {control} of the same comparison{', ASR on working backdoors only' if weak else ''}, "
                  "in points: mean over seeds with Student's 95 % interval over them; one seed has none. *: p < 0.05, "
                  "paired t test over seeds, Holm over the rows of one attack and measure. Of two or three seeds an "
                  "interval is wide, and rests on their being spread normally.", pd.DataFrame(shown), data, frame)]


OPPOSED = {"defense": "Defense", "settings": "Settings", "control": "Control's"}


def _opposed(frame: pd.DataFrame, control: str) -> list[tuple[dict[str, str], pd.DataFrame, pd.DataFrame]]:
    """Each defense beside the control of its comparison: labels as in OPPOSED, its rows, the control's. What is the
    same in two comparisons, settings and control's settings, is here once."""
    found: dict[tuple[str, ...], tuple[dict[str, str], pd.DataFrame, pd.DataFrame]] = {}
    for (defense, variant), part in frame[~frame.defense.isin([BEFORE, control])].groupby(["defense", "variant"],
                                                                                         sort=False):
        base = frame[(frame.defense == control) & (frame.variant == variant)]
        labels = {"defense": defense, "settings": part.settings.iloc[0], "control": next(iter(base.settings), MISSING)}
        found.setdefault(tuple(labels.values()), (labels, part, base))
    return list(found.values())


def _number(study: Study, control: str) -> str:
    """What a control adds to a table's name: nothing for the first one."""
    number = study.controls.index(control)
    return f"-{number + 1}" if number else ""


def _over_seeds(part: pd.DataFrame, control: pd.DataFrame, measure: str) -> dict[str, Any]:
    """One attack's paired comparison of one measure: difference in points, its interval over seeds, paired t test."""
    paired = pairs(part, control, measure)
    interval = over_attacks(paired, measure)
    return {"n": len(paired), "difference": interval.mean, "low": interval.low, "high": interval.high,
            "p": paired_t([pair.difference for pair in paired]).p,
            "runs": " ".join([pair.run_first for pair in paired] + [pair.run_second for pair in paired])}


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
            "mcnemar_lower": lower, "mcnemar_higher": sum(significant) - lower,
            "runs": " ".join([pair.run_first for pair in paired] + [pair.run_second for pair in paired])}


def within_a_line(heading: str) -> str:
    """A heading as it stands in a sentence or on an axis."""
    return heading if heading[:2].isupper() else heading[:1].lower() + heading[1:]


@dataclass(frozen=True)
class Factor:
    """One factor varied on one attack: its item, the label it is varied under, a heading and a caption.

    within: a second label whose values are compared apart, with its heading. on: the attack. measures: the columns.
    called: what is varied, in a title, where no heading says it.
    """

    item: str
    label: str
    title: str
    caption: str
    within: tuple[str, str] | None = None
    on: str = "BadNets"
    measures: Sequence[str] = PERCENT
    called: str = ""

    @property
    def name(self) -> str:
        """What is varied, in a title."""
        heading = self.within[1] if self.within and self.within[0] != "attack" else self.title
        return within_a_line(self.called or heading)

    @property
    def keys(self) -> dict[str, str]:
        """{label: heading} of the table's rows."""
        return ({self.within[0]: self.within[1]} if self.within else {}) | {self.label: self.title}


def ablation(results: Results, study: Study, factor: Factor) -> list[Table]:
    """One factor varied."""
    return if_present(results, study.paper, factor.item, lambda: listing(
        results, rows(results, study.paper, factor.item, *factor.keys), factor.keys, name=factor.item,
        title=f"{study.name}: {factor.name}", within=[factor.within[0]] if factor.within else [],
        measures=factor.measures, caption=f"{factor.on}. {factor.caption}"))


def clean_fraction(results: Results, study: Study) -> list[Table]:
    """BadNets with more or less clean data."""
    return if_present(results, study.paper, "clean-fraction", lambda: listing(
        results, defense_rows(results, study.paper, "clean-fraction", "fraction"),
        {"fraction": "Clean data", "defense": "Defense", "settings": "Settings"}, within=["fraction"],
        name="clean-fraction", title=f"{study.name}: share of clean data",
        caption="BadNets; the defender's share of the clean training set; marks within a share."))


def cost(results: Results, study: Study, items: Sequence[str] = ("main",)) -> Table:
    """Seconds per run, on the hardware they ran on; "Before" is the victim's training."""
    frame = pd.concat([defense_rows(results, study.paper, item) for item in items])
    frame["hardware"] = [hardware(results, row.run) if row.status == "done" else "" for row in frame.itertuples()]
    frame = measured(frame, "seconds")
    keys = {"defense": "Run", "settings": "Settings", "hardware": "Hardware"}
    data = estimates(frame, list(keys), ["seconds"]) if len(frame) else frame
    shown = [{"Run": "victim's training" if row.defense == BEFORE else row.defense, "Settings": row.settings,
              "Hardware": row.hardware, "Seconds": printed(row, 1), "n": Value(str(row.n))} for row in data.iloc]
    return table("cost", f"{study.name}: cost", "Wall seconds per run without the final evaluation, what another run "
                 "did for it included; mean ± sample SD over the n runs (attacks and seeds) of the main table. Runs "
                 "that shared the machine with others took longer than they need.", pd.DataFrame(shown), data, frame)


def hardware(results: Results, name: str) -> str:
    """What a finished run was computed on."""
    run = results.finished(name)
    environment = run.json("environment")
    device = environment.get("device", "unknown")
    return f"{environment.get('cpu', 'cpu')}, {environment.get('threads', '?')} threads" if device == "cpu" else device


def bounds(low: float, high: float, digits: int, sign: str = "") -> str:
    """ [low, high], or nothing where there is no interval."""
    return "" if math.isnan(low) else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def probability(value: float) -> str:
    """A p-value to three digits."""
    if math.isnan(value):
        return MISSING
    return f"{value:.3f}" if value >= 0.001 else "<0.001"
