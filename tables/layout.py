"""What the papers' tables share: estimates over seeds, marks for the best, a list shape and an attack grid."""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from reproduce.metrics import wilson
from reproduce.protocols import BEFORE, NEVER
from reproduce.results import Results
from reproduce.statistics import (
    ALPHA,
    LEVEL,
    Interval,
    McNemar,
    PairedTest,
    holm,
    mcnemar,
    over_groups,
    paired_difference,
    paired_t,
    sample_sd,
    t_interval,
)
from tables.render import BEST, MISSING, TIED, WRECKED, Table, Value, heading

PUBLISHED = Path(__file__).parent / "published"
UNDEFENDED = (BEFORE, NEVER)
TOOK = 50.0     # percent: below this ASR before the defense, there is no backdoor worth erasing
LOST = 20.0     # points of ACC: a model that has lost more is no repaired classifier, and its ASR says little
PERCENT = ("acc", "acc_nontarget", "asr", "excess", "ra")
AREAS = ("auroc", "auroc_target")       # in percent too, but no share of the test samples
DETECTION = (*AREAS, "far", "frr")
# Measures that are a share of test samples, and the column with the number of them.
COUNT = {"acc": "n_clean", "acc_nontarget": "n_nontarget", "asr": "n_nontarget", "ra": "n_nontarget",
         "base_rate": "n_nontarget", "far": "n_nontarget", "frr": "n_clean"}
LOWER = ("asr", "far", "frr")           # better when lower
MARKS = ("Bold: best mean of those with the column's most seeds; underlined (italic in Markdown): not significantly "
         "worse than it (paired t test over seeds, Holm within the column, 5 %). One seed decides nothing and gets no "
         "mark; with two or three hardly any difference is significant. Verdicts on claims take an exact signed-rank "
         "test, which assumes less and asks for more seeds.")
SPREAD = ("Percent, mean ± sample SD over seeds; with one seed, the value and its 95 % Wilson interval, which covers "
          "the test samples but not another training. n: seeds. - : not available.")
BASE = ("Excess ASR: ASR minus the base rate, the share of the same test samples that the same model calls the "
        "attacker's target without the trigger; so what the trigger brings about, in points, below zero where it hides "
        "more than it calls. With one seed its 95 % interval is paired over the test samples. It is not marked.")
FLOOR = (f"{NEVER}: what the victim would be had nobody poisoned its training set; it meets the same triggers, and "
         "what ASR it has is no backdoor's. It is no defense, and not compared.")
WITHOUT_TEST = ("AUROC with one seed: Hanley and McNeil's (1982) 95 % interval (none for AUROC target, which leaves "
                "samples out).")


@dataclass(frozen=True)
class Estimate:
    """Mean over n seeds; sd (sample) from two seeds on; a 95 % interval by `method`: "t", or with one seed "Wilson",
    "Hanley-McNeil" or "paired"."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    method: str

    @property
    def interval(self) -> Interval:
        return Interval(self.mean, self.low, self.high)

    def text(self, digits: int = 2) -> str:
        """mean ± SD, with one seed value [low, high], - without any."""
        if self.n == 0:
            return MISSING
        if self.n > 1:
            return f"{self.mean:.{digits}f} ± {self.sd:.{digits}f}"
        bounds = "" if math.isnan(self.low) else f" [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return f"{self.mean:.{digits}f}{bounds}"


def present(results: Results, paper: str, item: str) -> bool:
    """Whether the protocol entries at hand include this item."""
    return any((entry.paper, entry.item) == (paper, item) for entry in results.entries)


def measured(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The rows with a number for this measure."""
    return rows[_have(rows, measure)]


def _have(rows: pd.DataFrame, measure: str) -> np.ndarray:
    return (rows.status == "done").to_numpy() & rows[measure].notna().to_numpy()


def estimate(rows: pd.DataFrame, measure: str) -> Estimate:
    """Over the finished runs among `rows` of a results frame."""
    have = _have(rows, measure)
    values = rows[measure].to_numpy()[have].tolist()

    def counted(of: str) -> int:
        return int(rows[of].to_numpy()[have][0])

    if not values:
        return Estimate(0, math.nan, math.nan, math.nan, math.nan, "")
    if len(values) == 1:
        low, high, method = math.nan, math.nan, ""
        if measure in COUNT:
            trials = counted(COUNT[measure])
            low, high = wilson(round(values[0] / 100 * trials), trials)
            method = "Wilson"
        elif measure == "auroc":
            low, high = hanley_mcneil(values[0], counted("n_nontarget"), counted("n_clean"))
            method = "Hanley-McNeil"
        elif measure == "excess":
            low, high = (float(rows[f"excess_{end}"].to_numpy()[have][0]) for end in ("low", "high"))
            method = "paired"
        return Estimate(1, values[0], math.nan, low, high, method)
    interval = possible(t_interval(values), measure)
    return Estimate(len(values), interval.mean, sample_sd(values), interval.low, interval.high, "t")


def possible(interval: Interval, measure: str, difference: bool = False) -> Interval:
    """The part of a mean's interval that the measure, or a difference of two of its values, can take: no measure but
    an excess is negative, and shares end at 100. NaN stays."""
    signed = measure == "excess"
    top = (200.0 if signed and difference else 100.0) if signed or measure in (*COUNT, *AREAS) else math.inf
    bottom = -top if difference or signed else 0.0
    return Interval(interval.mean, *np.clip([interval.low, interval.high], bottom, top).tolist())


def hanley_mcneil(area: float, positives: int, negatives: int, level: float = LEVEL) -> tuple[float, float]:
    """Normal interval of an AUROC in percent, from it and the two numbers of samples alone (Hanley & McNeil,
    Radiology 1982). A triggered sentence counts as independent of its clean source."""
    a = area / 100
    both_triggered, both_clean = a / (2 - a), 2 * a * a / (1 + a)
    variance = (a * (1 - a) + (positives - 1) * (both_triggered - a * a) + (negatives - 1) * (both_clean - a * a)) \
        / (positives * negatives)
    half = 100 * float(stats.norm.ppf((1 + level) / 2)) * math.sqrt(max(0.0, variance))
    return max(0.0, area - half), min(100.0, area + half)


def estimates(frame: pd.DataFrame, keys: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """One row per group and measure: keys, measure, n, mean, sd, low, high, interval, mark (empty), runs.

    Groups keep the protocol's order; groups without a finished run are kept with n = 0.
    """
    rows = []
    for group, part in frame.groupby(list(keys), sort=False):
        for measure in measures:
            value = estimate(part, measure)
            rows.append({**dict(zip(keys, group, strict=True)), "measure": measure, "n": value.n, "mean": value.mean,
                         "sd": value.sd, "low": value.low, "high": value.high, "interval": value.method, "mark": "",
                         "runs": " ".join(part.run.to_numpy()[_have(part, measure)])})
    return pd.DataFrame(rows, columns=[*keys, "measure", "n", "mean", "sd", "low", "high", "interval", "mark", "runs"])


@dataclass(frozen=True)
class Pair:
    """A measure of two runs on the same victim."""

    attack: str
    first: float
    second: float
    run_first: str
    run_second: str

    @property
    def difference(self) -> float:
        return self.first - self.second


def pairs(first: pd.DataFrame, second: pd.DataFrame, measure: str) -> list[Pair]:
    """Finished runs of both sides with the same attack (where rows have one) and seed."""
    def keyed(rows: pd.DataFrame) -> dict[tuple[str, int], tuple[float, str]]:
        rows = measured(rows, measure)
        attacks = rows.attack if "attack" in rows else [""] * len(rows)
        return dict(zip(zip(attacks, rows.seed, strict=True), zip(rows[measure], rows.run, strict=True), strict=True))

    left, right = keyed(first), keyed(second)
    return [Pair(key[0], left[key][0], right[key][0], left[key][1], right[key][1]) for key in left if key in right]


def differences(paired: list[Pair]) -> dict[str, list[float]]:
    """First minus second, per attack."""
    found: dict[str, list[float]] = {}
    for pair in paired:
        found.setdefault(pair.attack, []).append(pair.difference)
    return found


def over_attacks(paired: list[Pair], measure: str) -> Interval:
    """Mean over attacks of first minus second, with its interval (`over_groups`)."""
    return possible(over_groups(list(differences(paired).values())), measure, difference=True)


def outcomes(results: Results, name: str, measure: str) -> np.ndarray:
    """Per-sample success of a finished run, bool (N,)."""
    return results.hits(name)[measure]


def compare(results: Results, first: pd.DataFrame, second: pd.DataFrame, measure: str) -> PairedTest:
    """Two defenses on the same victims: paired t over seeds, exact McNemar where there is one seed only and the measure
    is a share of test samples."""
    paired = pairs(first, second, measure)
    if len(paired) == 1 and measure in COUNT:
        return PairedTest(1, by_image(results, paired[0], measure).p)
    return paired_t([pair.difference for pair in paired])


def by_image(results: Results, pair: Pair, measure: str) -> McNemar:
    """The two runs of a pair, test image by test image."""
    return mcnemar(outcomes(results, pair.run_first, measure), outcomes(results, pair.run_second, measure))


def mean_difference(results: Results, paired: list[Pair], measure: str) -> Interval:
    """First minus second: t interval over seeds, with one seed the interval over its test samples."""
    if len(paired) > 1:
        return possible(t_interval([pair.difference for pair in paired]), measure, difference=True)
    return paired_difference(*(outcomes(results, name, measure) for name in (paired[0].run_first,
                                                                             paired[0].run_second)))


def mark(results: Results, frame: pd.DataFrame, data: pd.DataFrame, keys: Sequence[str],
         within: Sequence[str]) -> pd.DataFrame:
    """`data` with BEST and TIED set: per group of `within` and measure, among the rows with the most seeds, two or
    more, except what nothing defends; ASR of models that are no classifiers any more is WRECKED and not compared."""
    data = data.copy()
    groups = dict(iter(frame.groupby(list(keys), sort=False)))
    victims = {group for group, part in groups.items() if "defense" in part and part.defense.isin(UNDEFENDED).all()}
    lost = wrecked(frame, keys)
    of_rows = list(data[list(keys)].itertuples(index=False, name=None))
    broken = data.measure.isin(["asr", "excess"]) & np.array([group in lost for group in of_rows], dtype=bool)
    data.loc[broken, "mark"] = WRECKED
    undefended = np.array([group in victims for group in of_rows], dtype=bool)
    compared = data[(data.n > 0) & data.measure.isin([*COUNT, *AREAS]) & ~broken & ~undefended]
    for _group, candidates in compared.groupby([*within, "measure"], sort=False):
        candidates = candidates[candidates.n == candidates.n.max()]
        if len(candidates) < 2:
            continue
        measure = candidates.measure.iloc[0]
        best = candidates["mean"].idxmin() if measure in LOWER else candidates["mean"].idxmax()
        others = [i for i in candidates.index if i != best]
        rows = {i: groups[tuple(data.loc[i, list(keys)])] for i in candidates.index}
        adjusted = holm([paired_t([pair.difference for pair in pairs(rows[i], rows[best], measure)]).p for i in others])
        # A best one marked alone would seem to be significantly better than those that share no two seeds with it, and
        # of one seed nothing is known.
        if any(map(math.isnan, adjusted)):
            continue
        data.loc[best, "mark"] = BEST
        data.loc[[i for i, p in zip(others, adjusted, strict=True) if p >= ALPHA], "mark"] = TIED
    return data


def wrecked(frame: pd.DataFrame, keys: Sequence[str]) -> set[tuple[str, ...]]:
    """The groups of `keys` whose models have lost more than LOST points of the ACC of their victims, on average."""
    if not {"attack", "defense", "acc"} <= set(frame):
        return set()
    done = measured(frame, "acc")
    victims = done[done.defense == BEFORE].drop_duplicates(["attack", "seed"])
    both = done.merge(victims[["attack", "seed", "acc"]], on=["attack", "seed"], suffixes=("", "_before"))
    lost = (both.acc_before - both.acc).groupby([both[key] for key in keys]).mean()
    return {group if isinstance(group, tuple) else (group,) for group in lost[lost > LOST].index}


def footnotes(data: pd.DataFrame, weak: Collection[str] = ()) -> str:
    """What the daggers of a table mean, if it has any. weak: attacks that did not take."""
    said = f" † ASR before any defense below {TOOK:.0f} %: the attack did not take." if weak else ""
    if (data["mark"] == WRECKED).any():
        said += f" ‡ ACC more than {LOST:.0f} points below the victim's: not compared."
    return said


def printed(row: pd.Series, digits: int = 2) -> Value:
    """The cell for one row of `estimates`."""
    value = Estimate(int(row.n), row["mean"], row.sd, row.low, row.high, row.interval)
    return Value(value.text(digits), row["mark"], tuple(row.runs.split()))


def grouped(rows: list[dict[tuple[str, str], object]]) -> pd.DataFrame:
    """A printable frame with (group, column) headings; cells that a row lacks read "-"."""
    frame = pd.DataFrame(rows).fillna(Value(MISSING))
    if rows:
        frame.columns = pd.MultiIndex.from_tuples(frame.columns)
    return frame


def counts(values: Sequence[int]) -> str:
    """How many seeds: "6", or "2–6" where cells differ."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def table(name: str, title: str, caption: str, frame: pd.DataFrame, data: pd.DataFrame, source: pd.DataFrame,
          legend: str = "") -> Table:
    """A Table whose seeds and runs are the finished ones of the results frame `source`."""
    done = source[source.status == "done"]
    datasets, models = (tuple(done[key].dropna().unique()) if key in done else () for key in ("dataset", "model"))
    published = "published" in done and bool(done.published.all())
    processors = Counter(done.drop_duplicates("run").processor if "processor" in done else ()).most_common()
    return Table(name, title, caption, frame, data, tuple(sorted({int(seed) for seed in done.seed})),
                 tuple(dict.fromkeys(done.run)), legend, datasets, models, published, tuple(processors))


def legend(measures: Collection[str]) -> str:
    """How to read the cells of these measures."""
    return " ".join([SPREAD, *([] if set(measures) == {"excess"} else [MARKS]),
                     *([BASE] if "excess" in measures else []),
                     *([WITHOUT_TEST] if set(measures) & set(AREAS) else [])])


def listing(results: Results, frame: pd.DataFrame, keys: dict[str, str], *, name: str, title: str, caption: str,
            within: Sequence[str] = (), measures: Sequence[str] = PERCENT) -> Table:
    """One row per group of `keys` (label -> heading), one column per measure, and n. Marks compare rows that agree
    in `within`."""
    data = mark(results, frame, estimates(frame, list(keys), measures), list(keys), within)
    rows = []
    for group, part in data.groupby(list(keys), sort=False):
        cells = {heading(row.measure): printed(row) for _, row in part.iterrows()}
        rows.append({**dict(zip(keys.values(), group, strict=True)), **cells, "n": Value(counts(part.n.to_list()))})
    return table(name, title, caption + footnotes(data), pd.DataFrame(rows), data, frame, legend(measures))


def victims_asr(frame: pd.DataFrame) -> dict[str, float]:
    """Mean ASR before any defense, by attack; attacks without a finished victim are absent."""
    before = measured(frame[frame.defense == BEFORE], "asr")
    return before.groupby("attack", sort=False).asr.mean().to_dict()


def not_taken(frame: pd.DataFrame) -> list[str]:
    """Attacks whose victims show no working backdoor."""
    return [attack for attack, asr in victims_asr(frame).items() if asr < TOOK]


def common(frame: pd.DataFrame, keys: Sequence[str], measure: str) -> pd.DataFrame:
    """Finished runs on the (attack, seed) pairs that every group of `keys` has; groups that miss half of the pairs or
    more are left out, so that one unfinished defense does not empty the comparison."""
    done = measured(frame, measure)
    sizes = done.groupby(list(keys), sort=False).run.transform("size")
    done = done[sizes > sizes.max() / 2]
    groups = done.groupby(list(keys), sort=False).ngroups
    return done[done.groupby(["attack", "seed"]).run.transform("size") == groups]


def averages(frame: pd.DataFrame, keys: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """Mean over attacks per group, with an interval (`over_groups`), on the (attack, seed) pairs all groups have (see
    `common`).

    Columns: keys, attacks ("all", and "working backdoors" where some did not take), measure, n_attacks, n (runs), mean,
    low, high, runs, interval (what it is, empty without one).
    """
    rows = []
    weak = not_taken(frame)
    for which, part in (("all", frame), ("working backdoors", frame[~frame.attack.isin(weak)]))[:1 + bool(weak)]:
        for measure in measures:
            shared = common(part, keys, measure)
            for group, runs in shared.groupby(list(keys), sort=False):
                by_attack = [values[measure].to_list() for _, values in runs.groupby("attack", sort=False)]
                interval = possible(over_groups(by_attack), measure)
                rows.append({**dict(zip(keys, group, strict=True)), "attacks": which, "measure": measure,
                             "n_attacks": len(by_attack), "n": len(runs), "mean": interval.mean, "low": interval.low,
                             "high": interval.high, "runs": " ".join(runs.run),
                             "interval": "" if math.isnan(interval.low) else
                             f"t over {'attacks' if len(by_attack) > 1 else 'seeds'}"})
    return pd.DataFrame(rows)


def attack_grid(results: Results, frame: pd.DataFrame, *, name: str, title: str, caption: str,
                measures: Sequence[str] = ("asr", "acc")) -> Table:
    """A paper's main table: one row per attack, a group of columns per defense, and averages over attacks."""
    keys = ["attack", "defense"]
    data = mark(results, frame, estimates(frame, keys, measures), keys, ["attack"])
    weak = not_taken(frame)
    rows = []
    for attack, part in data.groupby("attack", sort=False):
        cells = {(row.defense, heading(row.measure)): printed(row, 1) for _, row in part.iterrows()}
        rows.append({("", "Attack"): f"{attack} †" if attack in weak else attack,
                     ("", "n"): counts(part.n.to_list()), **cells})
    means = averages(frame, ["defense"], measures)
    for which in ("all", "working backdoors") if weak else ("all",):
        part = means[means.attacks == which] if len(means) else means
        if not len(part):
            continue
        attacks = counts(part.n_attacks.to_list())
        cells = {(row.defense, heading(row.measure)): Value(f"{row['mean']:.1f}", runs=tuple(row.runs.split()))
                 for _, row in part.iterrows()}
        rows.append({("", "Attack"): "Average" if which == "all" else "Average, without †",
                     ("", "n"): f"{attacks} attack{'s' * (attacks != '1')}", **cells})
    shown = grouped(rows)
    extra = {"attack": "average, " + means.attacks + " (" + means.n_attacks.astype(str) + ")", "sd": math.nan,
             "mark": ""} if len(means) else {}
    numbers = pd.concat([data, means.assign(**extra)[data.columns]]) if len(means) else data
    return table(name, title, f"{caption} Averages: over attacks, on the (attack, seed) pairs finished for every "
                 f"defense but those that miss half of them.{footnotes(data, weak)}", shown, numbers, frame,
                 legend(measures))


def defense_grid(results: Results, frame: pd.DataFrame, measure: str, *, name: str, title: str,
                 caption: str) -> Table:
    """One measure of many defenses: a row per defense, a column per attack."""
    keys = ["attack", "defense"]
    data = mark(results, frame, estimates(frame, keys, [measure]), keys, ["attack"])
    weak = not_taken(frame)
    finished = data[data.n > 0].attack.unique()
    empty = [attack for attack in data.attack.unique() if len(finished) and attack not in finished]
    floor = f" {FLOOR}" if NEVER in set(data.defense) else ""
    absent = f" Without a finished run: {', '.join(empty)}." if empty else ""
    rows = []
    for defense, part in data[~data.attack.isin(empty)].groupby("defense", sort=False):
        cells = {f"{row.attack} †" if row.attack in weak else row.attack: printed(row, 1) for row in part.iloc}
        rows.append({"Defense": defense, **cells, "n": Value(counts(part.n.to_list()))})
    return table(name, f"{title}: {heading(measure)}", f"{caption}{floor}{absent}{footnotes(data, weak)}",
                 pd.DataFrame(rows).fillna(Value(MISSING)), data, frame, legend([measure]))
