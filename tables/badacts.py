"""BadActs' tables, from the runs of `reproduce.protocols.badacts`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd

from reproduce.protocols import NEVER
from reproduce.protocols.badacts import (
    CLS,
    INITIAL,
    METHOD,
    PAPER,
    RANDOM,
    REJECT,
    STATISTICS,
    THEN,
    WORDS,
    detection,
    purification,
    unpoisoned,
)
from reproduce.results import Results
from reproduce.statistics import holm
from tables.comparison import (
    Factor,
    Study,
    ablation,
    defense_rows,
    details,
    grids,
    hardware,
    if_present,
    rows,
)
from tables.layout import (
    BASE,
    BEFORE,
    DETECTION,
    SPREAD,
    WITHOUT_TEST,
    compare,
    counts,
    estimate,
    estimates,
    grouped,
    legend,
    listing,
    mark,
    mean_difference,
    measured,
    not_taken,
    over_attacks,
    pairs,
    present,
    printed,
    table,
)
from tables.render import MISSING, Table, Value, bounds, heading, probability

SAMPLE = "sentence"
NAMES = ("ACC is the paper's CACC, RA its PACC: the share of triggered sentences that get their source's true label. "
         "With two classes RA is 100 - ASR, unless sentences are rejected.")
STAND_IN = (f"{WORDS}'s perplexities are those of a trigram model of the defender's own sentences, which stands in for "
            "GPT-2.")
ON = "AddSent"
COUNTED = ("acc", "ra", "asr")
SHOWN = (*COUNTED, "excess")
FACTORS = (
    Factor("deviations", "k", "k (sigmas)", "A unit is abnormal outside mu ± k sigma of its clean activations; "
           "released: 3. The threshold is chosen for 5 % FRR each time.", on=ON, measures=DETECTION),
    Factor("frr", "frr_set", "FRR wanted", "Only flagged sentences are purified; the threshold is the suspicion that "
           "this share of the held-out clean sentences exceeds. Released: 20 % here, 5 % for detection alone.", on=ON,
           measures=(*SHOWN, "far", "frr")),
    Factor("weight", "weight", "First weight", "Of the intervals' width in the loss, before its schedule; released: "
           "0.1.", on=ON, measures=SHOWN),
    Factor("layers", "layers", "Layers clamped", "With the intervals that were optimised for all layers.", on=ON,
           measures=SHOWN),
    Factor("validation", "defense", "Defense", "The share of the validation split that the defender has.",
           within=("share", "Clean data"), on=ON, measures=SHOWN),
    Factor("poison-rate", "defense", "Defense", "The share of the training set that is poisoned.",
           within=("rate", "Poison rate"), on=ON, measures=SHOWN),
)
GPT2 = "onion-gpt2"     # the item with ONION's own language model
ITEMS = (purification, detection)   # of each data set
# The kinds of intervals compared, in the order of their table.
KINDS = (METHOD, STATISTICS, INITIAL, RANDOM, CLS)


def datasets(results: Results, items: Sequence[Callable[[str], str]] = ITEMS) -> list[str]:
    """The data sets of which one of these items, purification or detection, is among the protocol entries at hand."""
    return list(dict.fromkeys(entry.item.removeprefix(item("")) for entry in results.entries for item in items
                              if entry.paper == PAPER and entry.item.startswith(item(""))))


def items(results: Results, dataset: str) -> list[str]:
    """Those of a data set's items that are at hand."""
    return [item(dataset) for item in ITEMS if present(results, PAPER, item(dataset))]


def study(results: Results) -> Study:
    """The comparison on every data set at hand; the first one's grid is the paper's main table."""
    found = datasets(results)
    return Study(
        PAPER, METHOD, (STATISTICS, "FT"),
        {(purification(name), "released"): (purification(name) if i else "main", f"purification on {name}, as released")
         for i, name in enumerate(found)},
        {purification(name): f"purification on {name}" for name in found}, tall=True,
        floor={purification(name): unpoisoned(name) for name in found}, sample=SAMPLE, measures=NAMES)


def tables(results: Results, smoke: bool = False) -> list[Table]:
    """Every table whose entries are at hand, in the report's order."""
    whole = study(results)
    built = [_noted(one, NAMES) for one in grids(results, whole) + _per_dataset(results, purification, detection_first)]
    built += _per_dataset(results, detection, detectors) + _per_dataset(results, unpoisoned, innocent)
    built += _per_dataset(results, purification, intervals)
    built += _per_dataset(results, purification, cleaning)
    built += details(results, whole)
    built = [_noted(one, STAND_IN) if WORDS in set(one.data.get("defense", ())) else one for one in built]
    for factor in FACTORS:
        apart = f"Marks compare rows with the same {factor.within[0]}." if factor.within else ""
        built += [_noted(one, apart) for one in ablation(results, whole, factor)]
    built += if_present(results, PAPER, GPT2, lambda: language_models(results))
    built += [flattered(results, name) for name in datasets(results) if _common(results, name)]
    if datasets(results):
        built += [triggers(results), cost(results)]
    return [replace(entry, name=f"{PAPER}-{entry.name}") for entry in built if len(entry.frame)]


def _per_dataset(results: Results, item: Callable[[str], str], build: Callable[[Results, str], Table]) -> list[Table]:
    return [build(results, name) for name in datasets(results, (item,))]


def _common(results: Results, dataset: str) -> list[Callable[[str], str]]:
    """The kinds of items at hand both for a data set and for its released form."""
    return [item for item in ITEMS if {item(dataset), item(f"{dataset}-released")} <= {
        *items(results, dataset), *items(results, f"{dataset}-released")}]


def _noted(one: Table, note: str) -> Table:
    return replace(one, caption=" ".join(filter(None, [one.caption, note])))


def detection_rows(results: Results, dataset: str) -> pd.DataFrame:
    """The detectors' runs on a data set."""
    frame = defense_rows(results, PAPER, detection(dataset))
    return frame[frame.defense != BEFORE]


def detectors(results: Results, dataset: str) -> Table:
    """Every detector on every attack."""
    weak = not_taken(rows(results, PAPER, detection(dataset), "attack", "defense"))
    flagged = f" The attack did not take: {', '.join(weak)}." if weak else ""
    return listing(
        results, detection_rows(results, dataset),
        {"attack": "Attack", "defense": "Detector", "settings": "Settings"}, name=detection(dataset),
        title=f"BadActs: detection on {dataset}", within=["attack"], measures=DETECTION,
        caption="AUROC: that a triggered sentence is more suspicious than a clean one; AUROC target: among the "
                "sentences that the undefended victim calls the target. FAR: share of triggered sentences that are not "
                "flagged; FRR: share of clean ones that are. Thresholds are chosen on clean data for 5 % FRR; FAR and "
                "FRR trade off against each other, so a mark for one alone says little. BadActs' suspicion is 1 - NAS. "
                f"Marks within an attack.{flagged}")


def innocent(results: Results, dataset: str) -> Table:
    """The detectors on the model without a backdoor: whether they tell its trigger, or just an odd sentence."""
    keys = ["attack", "defense", "settings"]
    never = rows(results, PAPER, unpoisoned(dataset), *keys)
    never = never[never.defense != NEVER]
    victims = rows(results, PAPER, detection(dataset), *keys)
    victims = victims[victims.defense != BEFORE]
    on_victims = dict(iter(victims.groupby(keys, sort=False)))
    numbers, shown = [], []
    for group, part in never.groupby(keys, sort=False):
        same = on_victims.get(group, part.iloc[:0])
        found = {"victim": estimate(same, "auroc"), "never": estimate(part, "auroc")}
        if not found["never"].n:
            continue
        paired = pairs(same, part, "auroc")
        gap = over_attacks(paired, "auroc")
        moved = f"{gap.mean:+.1f}{bounds(gap.low, gap.high, 1, '+')}" if paired else MISSING
        labels = dict(zip(keys, group, strict=True))
        numbers.append({**labels, "measure": "auroc", **{f"{on}_{name}": getattr(value, name) for on, value in
                                                         found.items() for name in ("n", "mean", "sd", "low", "high")},
                        "difference": gap.mean, "from": gap.low, "to": gap.high, "n": len(paired),
                        "runs": " ".join([*measured(same, "auroc").run, *measured(part, "auroc").run])})
        shown.append({"Attack": labels["attack"], "Detector": labels["defense"], "Settings": labels["settings"],
                      "On the victim": Value(found["victim"].text(1), runs=tuple(measured(same, "auroc").run)),
                      "Never poisoned": Value(found["never"].text(1), runs=tuple(measured(part, "auroc").run)),
                      "Difference": Value(moved), "n": Value(str(len(paired)))})
    return table(unpoisoned(dataset), f"BadActs: detectors where there is no backdoor, {dataset}",
                 "AUROC, in percent, of triggered against clean sentences: on the attack's victim, and on the model "
                 "that was trained on the same sentences without poison, where the trigger is no trigger. What a "
                 "detector has there it owes to odd words or broken paraphrases; a perfect one of backdoors has 50. "
                 "Difference: in points, over the n seeds that both have, with a 95 % t interval over them.",
                 pd.DataFrame(shown), pd.DataFrame(numbers), pd.concat([victims, never]), f"{SPREAD} {WITHOUT_TEST}")


def detection_first(results: Results, dataset: str) -> Table:
    """What it changes to purify, or to reject, only what is flagged."""
    frame = rows(results, PAPER, purification(dataset), "attack", "defense", "variant")
    frame = frame[frame.defense.isin([BEFORE, METHOD, THEN, REJECT]) & frame.variant.isin(["released", MISSING])]
    if not frame.defense.isin([THEN, REJECT]).any():    # a brief comparison
        frame = frame.iloc[:0]
    order = {name: i for i, name in enumerate((BEFORE, METHOD, THEN, REJECT))}
    frame = frame.sort_values("defense", key=lambda names: names.map(order), kind="stable")
    keys = ["attack", "defense"]
    data = estimates(frame, keys, (*COUNTED, "far", "frr"))
    parts = dict(iter(frame.groupby(keys, sort=False)))
    tests = pd.DataFrame([_difference(results, parts[row.attack, row.defense], parts.get((row.attack, METHOD)),
                                      row.measure) for row in data.iloc], columns=["difference", "from", "to", "p"])
    data = data.join(tests.assign(p_holm=holm(tests.p.to_list())))
    attacks = list(dict.fromkeys(rows(results, PAPER, purification(dataset), "attack").attack))
    shown = []
    for attack, defense in sorted(parts, key=lambda key: (attacks.index(key[0]), order[key[1]])):
        line: dict[tuple[str, str], object] = {("", "Attack"): attack, ("", "Defense"): defense}
        part = data[(data.attack == attack) & (data.defense == defense)]
        for row in part.iloc:
            name = heading(row.measure)
            line[name, "Value"] = printed(row, 1)
            if row.measure in COUNTED:
                change = MISSING if math.isnan(row.difference) else \
                    f"{row.difference:+.1f}{bounds(row['from'], row.to, 1, '+')}"
                line |= {(name, "Difference"): Value(change), (name, "p (Holm)"): Value(probability(row.p_holm))}
        shown.append({**line, ("", "n"): Value(counts(part.n[part.measure.isin(COUNTED)].to_list()))})
    return table(f"{purification(dataset)}-detection-first",
                 f"BadActs: detection first or everything purified, {dataset}",
                 f"{METHOD} purifies every sentence; \"{THEN}\" purifies those that its detector flags (threshold for "
                 f"20 % FRR), \"{REJECT}\" gives those no label at all (5 %), which counts as an error on clean "
                 "sentences and as a failed attack on triggered ones. Difference: to purifying everything, in points, "
                 "paired, with a 95 % interval (t over seeds; with one seed Wald's over test sentences). p: paired t "
                 "test over seeds, with one seed exact McNemar over test sentences; Holm over the table. Nothing is "
                 "bold.", grouped(shown), data, frame, SPREAD)


def _difference(results: Results, ours: pd.DataFrame, base: pd.DataFrame | None, measure: str) -> tuple[float, ...]:
    """`ours` minus `base`, its interval and p; NaN where there is nothing to compare, or both are the same rows."""
    paired = [] if base is None or measure not in COUNTED or ours is base else pairs(ours, base, measure)
    if base is None or not paired:
        return (math.nan,) * 4
    interval = mean_difference(results, paired, measure)
    return interval.mean, interval.low, interval.high, compare(results, ours, base, measure).p


def reported(results: Results, frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """The frame with columns of what its finished runs report about themselves (NaN where they do not)."""
    infos = [results.finished(row.run).json("metrics")["info"] if row.status == "done" else {} for row in frame.iloc]
    return frame.assign(**{name: pd.Series([info.get(name, math.nan) for info in infos], frame.index, dtype=float)
                           for name in names})


def intervals(results: Results, dataset: str) -> Table:
    """Whether optimising the intervals does anything: their width, and what each kind of them does."""
    frame = defense_rows(results, PAPER, purification(dataset))
    # mu ± k sigma has no variants: one run stands in the comparison of both.
    frame = frame[frame.defense.isin(KINDS)].drop_duplicates(["attack", "defense", "run"])
    frame = reported(results, frame, "width", "kept", "restarts")
    keys = ["attack", "defense", "settings"]
    columns = {"width": ("Width", 2), "kept": ("Clean labels kept", 1), "restarts": ("Restarts", 1), "acc": ("ACC", 2),
               "asr": ("ASR", 2), "excess": (heading("excess"), 2)}
    data = mark(results, frame, estimates(frame, keys, list(columns)), keys, ["attack"])
    shown = []
    for (attack, defense, settings), part in data.groupby(keys, sort=False) if len(data) else ():
        cells = {columns[row.measure][0]: printed(row, columns[row.measure][1]) for row in part.iloc}
        shown.append({"Attack": attack, "Intervals": defense, "Settings": settings, **cells,
                      "n": Value(str(int(part.n.max())))})
    order = {name: i for i, name in enumerate(KINDS)}
    attacks = list(dict.fromkeys(frame.attack))
    shown.sort(key=lambda line: (attacks.index(line["Attack"]), order[line["Intervals"]]))
    return table(f"{purification(dataset)}-intervals", f"BadActs: optimised intervals and others, {dataset}",
                 "Width: mean of upper minus lower bound over the units of all layers, in units of activation. Clean "
                 "labels kept: percent of the clean sentences of the search that the clamped model classifies as "
                 f"before, where there was a search. Restarts: of a search that kept too few. \"{INITIAL}\": the "
                 f"constants that the search starts from; \"{RANDOM}\": the optimised intervals in another order of "
                 f"the units of a layer; \"{CLS}\": applied to the first token alone. ACC and ASR in percent; marks "
                 "within an attack.", pd.DataFrame(shown), data, frame, legend(["acc", "asr", "excess"]))


def cleaning(results: Results, dataset: str) -> Table:
    """What a defense that cleans the training set takes out of it."""
    frame = reported(results, defense_rows(results, PAPER, purification(dataset)), "training_sentences", "poisoned",
                     "clusters", "dropped", "dropped_poisoned")
    # Runs of before this was counted, and all other defenses, do not say.
    frame = frame[frame.dropped_poisoned.notna()]
    frame = frame.assign(of_poisoned=100 * frame.dropped_poisoned / frame.poisoned,
                         of_clean=100 * (frame.dropped - frame.dropped_poisoned) /
                         (frame.training_sentences - frame.poisoned))
    keys = ["attack", "defense", "settings"]
    columns = {"clusters": "Clusters", "of_poisoned": "Poisoned dropped", "of_clean": "Clean dropped",
               **{measure: heading(measure) for measure in ("acc", "asr", "excess")}}
    data = estimates(frame, keys, list(columns)) if len(frame) else frame
    shown = []
    for (attack, defense, settings), part in data.groupby(keys, sort=False):
        cells = {columns[row.measure]: printed(row, 1) for row in part.iloc}
        shown.append({"Attack": attack, "Defense": defense, "Settings": settings, **cells,
                      "n": Value(str(int(part.n.max())))})
    return table(f"{purification(dataset)}-cleaning", f"BadActs: what cleaning the training set drops, {dataset}",
                 "Poisoned dropped, clean dropped: percent of the poisoned and of the other training sentences that "
                 "the defense takes out before a new model is trained on what is left; ACC and ASR, in percent, are "
                 "that model's. Clusters: of the training sentences' features. A run made before this was counted "
                 "is not here.", pd.DataFrame(shown), data, frame, f"{SPREAD} {BASE}")


def language_models(results: Results) -> Table:
    """ONION with its own language model, beside the stand-in on the same victims."""
    item = rows(results, PAPER, GPT2, "attack", "defense", "variant")
    others = [rows(results, PAPER, purification(name), "attack", "defense", "variant") for name in datasets(results)]
    same = [frame[(frame.defense == WORDS) & frame.dataset.isin(item.dataset)] for frame in others]
    return listing(results, pd.concat([item, *same]), {"attack": "Attack", "defense": "Defense"}, name=GPT2,
                   title="BadActs: purification in word space by GPT-2", within=["attack"], measures=SHOWN,
                   caption=f"{STAND_IN} Marks within an attack. {NAMES}")


def flattered(results: Results, dataset: str) -> Table:
    """What a validation split that is the test split, as the released one of a data set, adds to the results."""
    other = f"{dataset}-released"
    measures = {purification: ("acc", "ra", "asr"), detection: DETECTION}
    numbers, frames = [], []
    for item in _common(results, dataset):
        columns = measures[item]
        ours, theirs = (rows(results, PAPER, item(name), "attack", "defense", "variant") for name in (dataset, other))
        if item is detection:   # victims are in both items
            ours, theirs = ours[ours.defense != BEFORE], theirs[theirs.defense != BEFORE]
        frames += [ours, theirs]
        for (attack, defense, variant), part in theirs.groupby(["attack", "defense", "variant"], sort=False):
            same = ours[(ours.attack == attack) & (ours.defense == defense) & (ours.variant == variant)]
            for measure in columns:
                gaps = [pair.difference for pair in pairs(part, same, measure)]
                numbers.append({"attack": attack, "task": item("").rstrip("-"), "defense": defense,
                                "settings": variant, "measure": measure, "own": estimate(same, measure).mean,
                                "released": estimate(part, measure).mean, "n": len(gaps),
                                "difference": sum(gaps) / len(gaps) if gaps else math.nan,
                                "runs": " ".join([*measured(same, measure).run, *measured(part, measure).run])})
    data = pd.DataFrame(numbers)
    shown = []
    for row in data.iloc:
        runs = tuple(row.runs.split())
        shown.append({"Attack": row.attack, "Task": row.task, "Defense": row.defense, "Measure": heading(row.measure),
                      "Own": Value(_percent(row.own), runs=runs), "Released": Value(_percent(row.released), runs=runs),
                      "Difference": Value(_percent(row.difference, "+"), runs=runs), "n": Value(str(row.n))})
    return table(f"{dataset}-released-validation", f"BadActs: the released validation split of {dataset}",
                 f"The released validation split of {dataset} is its test split: epochs, intervals, statistics and "
                 f"thresholds are fitted to what is then measured (\"Released\", data set {other}). \"Own\": the "
                 "validation split is cut from the training set. Percent, means over seeds; difference: released minus "
                 "own on n seeds, in points. The victims differ as well, so no test is made.",
                 pd.DataFrame(shown), data, pd.concat(frames))


def _percent(value: float, sign: str = "") -> str:
    return MISSING if math.isnan(value) else f"{value:{sign}.2f}"


QUALITY = {"unchanged": "Unchanged", "degenerate": "Degenerate", "clean_degenerate": "Degenerate sources",
           "words_kept": "Words kept", "length": "Length", "asr": "ASR of the victim"}


def triggers(results: Results) -> Table:
    """How good the triggered test sentences are as sentences."""
    parts = []
    for name in datasets(results):
        # The same victims are in both items.
        frame = rows(results, PAPER, items(results, name)[0], "attack", "defense")
        parts.append(frame[frame.defense == BEFORE].assign(place=name))
    frame = pd.concat(parts)
    quality = [results.finished(row.run).json("metrics")["info"].get("trigger", {}) if row.status == "done" else {}
               for row in frame.iloc]
    frame = frame.assign(**{key: [found.get(key, math.nan) for found in quality] for key in QUALITY if key != "asr"})
    data = estimates(frame, ["place", "attack"], list(QUALITY))
    shown = []
    for (name, attack), part in data.groupby(["place", "attack"], sort=False):
        cells = {QUALITY[row.measure]: printed(row, 1) for row in part.iloc}
        shown.append({"Data set": name, "Attack": attack, **cells, "n": Value(str(int(part.n.max())))})
    return table("triggers", "BadActs: the triggered sentences",
                 "Of the triggered test sentences, in percent. Unchanged: equal to the source. Degenerate: a word "
                 "three times in a row, or a pair of words three times or more; degenerate sources: the same count on "
                 "the clean sentences they were made from. Words kept: of the source's distinct words. Length: in "
                 "words, relative to the source's. Where sentences are degenerate or keep few words, RA has a low "
                 "ceiling, and a detector may find bad sentences instead of triggers.",
                 pd.DataFrame(shown), data, frame, SPREAD)


def cost(results: Results) -> Table:
    """Seconds to prepare each defense and to judge sentences with it."""
    parts = []
    for name in datasets(results):
        for item in items(results, name):
            frame = defense_rows(results, PAPER, item)
            parts.append(frame.assign(place=name, task=item.removesuffix(f"-{name}")))
    frame = measured(pd.concat(parts), "seconds")
    frame = frame[~((frame.defense == BEFORE) & (frame.task == detection("").rstrip("-")))]
    frame = reported(results, frame, "judging_seconds")
    frame["judging"] = 1000 * frame.judging_seconds / (frame.n_clean + frame.n_nontarget)
    frame["hardware"] = [hardware(results, name) for name in frame.run]
    keys = {"place": "Data set", "task": "Task", "defense": "Run", "settings": "Settings", "hardware": "Hardware"}
    measures = {"seconds": "Seconds", "judging": "Seconds per 1000 sentences"}
    data = estimates(frame, list(keys), list(measures)) if len(frame) else frame
    shown = []
    for group, part in data.groupby(list(keys), sort=False) if len(frame) else ():
        labels = dict(zip(keys.values(), group, strict=True))
        if labels["Run"] == BEFORE:
            labels |= {"Task": MISSING, "Run": "victim's training"}
        shown.append({**labels, **{measures[row.measure]: printed(row, 1) for row in part.iloc},
                      "n": Value(str(int(part.n.max())))})
    return table("cost", "BadActs: cost",
                 "Wall seconds, mean ± sample SD over the n runs (attacks and seeds). Seconds: to prepare the defense, "
                 "the search for intervals included where it is another run's. Seconds per 1000 sentences: what it "
                 "then takes to judge the test sentences. Runs that shared the machine with others took longer than "
                 "they need.",
                 pd.DataFrame(shown), data, frame)
