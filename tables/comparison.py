"""What the tables of several papers share: a paper's defenses on its attacks, one factor varied, cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from reproduce.results import Results, processor
from tables.layout import (
    BASE,
    BEFORE,
    NEVER,
    PERCENT,
    attack_grid,
    averages,
    defense_grid,
    estimates,
    listing,
    measured,
    not_taken,
    present,
    printed,
    table,
)
from tables.paired import against_control, by_attack
from tables.render import MISSING, Table, Value, bounds, heading

AUTHORS_VICTIM = "the checkpoint its authors published"
LABELS = ("attack", "defense", "variant", "settings")


@dataclass(frozen=True)
class Study:
    """A paper's comparison; its entries are labelled attack, defense and variant (a victim has no variant).

    controls: rows that the other defenses are tested against, e.g. the method without its own term; plain fine-tuning.
    main: {(item, variant): (table name, title)} of the attack grids, in the report's order.
    attacks: {item: which attacks it holds, in words}.
    tall: too many defenses to stand side by side: a table per measure of `grid`, a row per defense.
    floor: {item: that of the same triggers on what was never poisoned}.
    sample: what a test set consists of. measures: how the paper calls its measures, said where all are shown.
    """

    paper: str
    name: str
    controls: tuple[str, ...]
    main: dict[tuple[str, str], tuple[str, str]]
    attacks: dict[str, str]
    tall: bool = False
    floor: dict[str, str] = field(default_factory=dict)
    grid: tuple[str, ...] = ("asr", "excess", "acc")
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


def with_never_poisoned(results: Results, frame: pd.DataFrame, paper: str, item: str) -> pd.DataFrame:
    """A comparison's frame, and below its victims what was never poisoned, where the item is at hand."""
    floor = rows(results, paper, item, "defense")
    if not len(frame) or not len(floor):
        return frame
    victims = frame.defense == BEFORE
    return pd.concat([frame[victims], floor[floor.defense == NEVER], frame[~victims]], ignore_index=True)


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
            frame = with_never_poisoned(results, frame, study.paper, study.floor.get(item, ""))
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
    measures = ("asr", "excess", "acc", "acc_nontarget", "ra")
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
                 pd.concat(frames.values()), BASE)


def significance(results: Results, study: Study, item: str, control: str) -> Table:
    """Each defense against one control, paired over (attack, seed)."""
    frame = rows(results, study.paper, item, *LABELS)
    return against_control(results, frame, control, not_taken(frame), f"{item}-significance{_number(study, control)}",
                           f"{study.name}: each defense against {control}, "
                           f"{study.attacks.get(item, f'on {AUTHORS_VICTIM}')}", study.sample)


def attack_by_attack(results: Results, study: Study, item: str, control: str) -> list[Table]:
    """Each defense against one control on each attack by itself, paired over seeds; nothing where one seed is asked
    for, of which there is no interval."""
    frame = rows(results, study.paper, item, *LABELS)
    if frame.seed.nunique() < 2:
        return []
    return [by_attack(frame, control, not_taken(frame), f"{item}-by-attack{_number(study, control)}",
                      f"{study.name}: each defense against {control}, attack by attack")]


def _number(study: Study, control: str) -> str:
    """What a control adds to a table's name: nothing for the first one."""
    number = study.controls.index(control)
    return f"-{number + 1}" if number else ""


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
    if environment.get("device") != "cpu":
        return processor(run)
    threads = environment.get("threads", "?")
    return f"{processor(run)}, {threads} thread{'' if threads == 1 else 's'}"
