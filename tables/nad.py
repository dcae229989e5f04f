"""NAD's tables, from the runs of `reproduce.protocols.nad`."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd

from reproduce.results import Results
from reproduce.statistics import (
    ALPHA,
    hierarchical_bootstrap,
    holm,
    prediction_interval,
    wilcoxon,
)
from tables.layout import (
    BEFORE,
    PUBLISHED,
    SPREAD,
    attack_grid,
    averages,
    by_image,
    differences,
    estimate,
    estimates,
    grouped,
    listing,
    measured,
    not_taken,
    pairs,
    present,
    printed,
    table,
)
from tables.render import MISSING, Table, Value, heading

PAPER = "nad"
CONTROL = "NAD (beta = 0)"
ROUNDING = 0.005        # published values have two decimals
WIDE = 20.0             # points: a prediction interval wider than this agrees with almost anything
VARIANTS = ("described", "released")
# Items that hold runs to compare with the authors' own numbers, and on whose victim.
VICTIMS = {"authors-victim": "authors' victim", "main": "our victim", "variants": "our victim"}


def tables(results: Results, smoke: bool = False) -> list[Table]:
    """Every table whose entries are at hand, in the report's order. At smoke scale nothing is compared with a paper."""
    built: list[Table] = []
    for variant in VARIANTS:
        built += _if_present(results, "main", lambda item, v=variant: grid(results, item, v))
    built += _if_present(results, "main-released", lambda item: grid(results, item, "released"))
    built += published(results, smoke)
    for item in ("main", "main-released"):
        built += _if_present(results, item, lambda item: complete(results, item))
        built += _if_present(results, item, lambda item: mean_over_attacks(results, item))
        built += _if_present(results, item, lambda item: significance(results, item))
    built += _if_present(results, "clean-fraction", lambda item: clean_fraction(results))
    for item in ABLATIONS:
        built += _if_present(results, item, lambda item: ablation(results, item))
    built += _if_present(results, "augmentation", lambda item: augmentation(results))
    built += _if_present(results, "authors-victim", lambda item: authors_victim(results))
    built += _if_present(results, "curves", lambda item: epochs(results, smoke))
    built += _if_present(results, "main", lambda item: cost(results))
    return [replace(entry, name=f"{PAPER}-{entry.name}") for entry in built if len(entry.frame)]


def _if_present(results: Results, item: str, build: Callable[[str], Table]) -> list[Table]:
    return [build(item)] if present(results, PAPER, item) else []


def rows(results: Results, item: str, *keys: str) -> pd.DataFrame:
    """The results frame of an item; a label that some entries lack (a victim has no variant) reads "-"."""
    frame = results.frame(PAPER, item)
    for key in keys:
        frame[key] = frame[key].fillna(MISSING) if key in frame else MISSING
    return frame


def main_rows(results: Results, item: str, variant: str) -> pd.DataFrame:
    """Victims, and the defenses in one variant, of "main" or "main-released"."""
    frame = rows(results, item, "attack", "defense", "variant")
    frame = frame[frame.variant.isin([variant, MISSING])]
    # Victims alone are no comparison.
    return frame if (frame.variant == variant).any() else frame.iloc[:0]


MAIN_TITLES = {
    ("main", "described"): ("main", "NAD: attacks and defenses as described"),
    ("main", "released"): ("main-released-defenses", "NAD: attacks as described, defenses with released settings"),
    ("main-released", "released"): ("main-released", "NAD: attacks and defenses as in the released code"),
}


def grid(results: Results, item: str, variant: str) -> Table:
    """ASR and ACC per attack and defense."""
    name, title = MAIN_TITLES[item, variant]
    return attack_grid(results, main_rows(results, item, variant), name=name, title=title,
                       caption="ASR on triggered non-target test images and ACC on all clean test images.")


def complete(results: Results, item: str) -> Table:
    """Every measure of every attack, defense and variant."""
    frame = rows(results, item, "attack", "defense", "variant")
    weak = not_taken(frame)
    flagged = f" The attack did not take: {', '.join(weak)}." if weak else ""
    return listing(results, frame, {"attack": "Attack", "defense": "Defense", "variant": "Settings"},
                   name=f"{item}-complete", title=f"NAD: every measure, {_attacks(item)}", within=["attack"],
                   caption=f"ACC non-target is NAD's own accuracy: without the target class.{flagged}")


def _attacks(item: str) -> str:
    return "attacks as in the released code" if item == "main-released" else "attacks as described"


def mean_over_attacks(results: Results, item: str) -> Table:
    """Averages with intervals that cover both other seeds and other attacks, per variant of the defenses."""
    measures = ("asr", "acc", "acc_nontarget", "ra")
    frames = {variant: main_rows(results, item, variant) for variant in VARIANTS}
    parts = [averages(frame, ["defense"], measures).assign(settings=variant) for variant, frame in frames.items()]
    data = pd.concat([part for part in parts if len(part)] or [pd.DataFrame()], ignore_index=True)
    shown = []
    if len(data):
        for (which, settings, defense), part in data.groupby(["attacks", "settings", "defense"], sort=False):
            cells = {heading(row.measure): Value(f"{row['mean']:.2f}{_bounds(row.low, row.high, 2)}",
                                                 runs=tuple(row.runs.split())) for row in part.iloc}
            first = part.iloc[0]
            shown.append({"Attacks": f"{which} ({first.n_attacks})", "Settings": settings, "Defense": defense, **cells,
                          "Runs": Value(str(first.n))})
    return table(f"{item}-averages", f"NAD: averages over attacks, {_attacks(item)}",
                 "Percent: mean over attacks of the mean over seeds, with a 95 % hierarchical bootstrap interval "
                 "(attacks, then seeds). Only (attack, seed) pairs finished for every defense of the block count. With "
                 "six attacks or fewer such intervals are somewhat too narrow.", pd.DataFrame(shown), data,
                 pd.concat(frames.values()))


def significance(results: Results, item: str) -> Table:
    """Each defense against fine-tuning on NAD's schedule, paired over (attack, seed)."""
    frame = rows(results, item, "attack", "defense", "variant")
    compared = []
    for (defense, variant), part in frame[~frame.defense.isin([BEFORE, CONTROL])].groupby(["defense", "variant"],
                                                                                         sort=False):
        control = frame[(frame.defense == CONTROL) & (frame.variant == variant)]
        compared += [{"defense": defense, "settings": variant, **against(results, part, control, measure)}
                     for measure in ("asr", "acc")]
    data = pd.DataFrame(compared)
    data = data[data.n > 0].copy() if len(data) else data
    shown = []
    if len(data):
        data.insert(data.columns.get_loc("p") + 1, "p_holm", holm(data.p.to_list()))
        shown = [{
            "Defense": row.defense, "Settings": row.settings, "Measure": heading(row.measure),
            "Difference": Value(f"{row.difference:+.2f}{_bounds(row.low, row.high, 2, '+')}",
                                runs=tuple(row.runs.split())),
            "Pairs": Value(str(row.n)), "p": Value(_p(row.p)), "p (Holm)": Value(_p(row.p_holm)),
            "Attacks": Value(str(row.n_attacks)), "p over attacks": Value(_p(row.p_attacks)),
            "McNemar lower / higher / pairs": Value(f"{row.mcnemar_lower} / {row.mcnemar_higher} / {row.n}"),
        } for row in data.iloc]
    return table(f"{item}-significance", f"NAD: each defense against {CONTROL}, {_attacks(item)}",
                 f"Defense minus {CONTROL} with the same settings, in points: mean over attacks with a 95 % "
                 "hierarchical bootstrap interval. p: exact two-sided Wilcoxon signed-rank test over (attack, seed) "
                 "pairs, which takes the seeds of an attack as independent; p over attacks: the same on one mean "
                 "difference per attack, not corrected. Below 6 non-zero differences p cannot reach 0.05. Holm: over "
                 "the rows of this table. McNemar: in how many pairs, test image by test image, the measure is "
                 "significantly lower or higher (5 %, Holm over the pairs of the row).", pd.DataFrame(shown), data,
                 frame)


def against(results: Results, part: pd.DataFrame, control: pd.DataFrame, measure: str) -> dict[str, Any]:
    """Paired comparison of one measure: difference in points, Wilcoxon over pairs and over attacks, McNemar counts."""
    paired = pairs(part, control, measure)
    by_attack = list(differences(paired).values())
    interval = hierarchical_bootstrap(by_attack)
    test = wilcoxon([pair.difference for pair in paired])
    over_attacks = wilcoxon([sum(values) / len(values) for values in by_attack])
    single = [by_image(results, pair, measure) for pair in paired]
    significant = [p < ALPHA for p in holm([result.p for result in single])]
    lower = sum(s and result.only_first < result.only_second for s, result in zip(significant, single, strict=True))
    return {"measure": measure, "n": len(paired), "n_attacks": len(by_attack), "difference": interval.mean,
            "low": interval.low, "high": interval.high, "p": test.p, "p_attacks": over_attacks.p,
            "mcnemar_lower": lower, "mcnemar_higher": sum(significant) - lower,
            "runs": " ".join([pair.run_first for pair in paired] + [pair.run_second for pair in paired])}


def clean_fraction(results: Results) -> Table:
    """BadNets with more or less clean data."""
    frame = rows(results, "clean-fraction", "fraction", "defense", "variant")
    return listing(results, frame, {"fraction": "Clean data", "defense": "Defense", "variant": "Settings"},
                   within=["fraction"], name="clean-fraction", title="NAD: share of clean data",
                   caption="BadNets; the defender's share of the clean training set; marks within a share.")


ABLATIONS = {
    "attention": ("Attention function", "After the scaling to unit norm, sum and mean are the same map."),
    "distillation": ("Distillation", "What the student is made to copy."),
    "teacher": ("Teacher", "Whose attention the student copies."),
    "beta": ("Factor on beta", "Weight of the distillation terms, as a factor on the released betas."),
    "variants": ("Variant", "Described and released settings side by side."),
}


def ablation(results: Results, item: str) -> Table:
    """One choice of NAD varied, on BadNets."""
    label = {"variants": "variant"}.get(item, item)
    title, caption = ABLATIONS[item]
    return listing(results, rows(results, item, label), {label: title}, name=item, title=f"NAD: {title.lower()}",
                   caption=f"BadNets. {caption}")


def augmentation(results: Results) -> Table:
    """Victims trained with and without augmentation."""
    return listing(results, rows(results, "augmentation", "victim", "defense"),
                   {"victim": "Victim's training", "defense": "Defense"}, within=["victim"], name="augmentation",
                   title="NAD: augmentation in the victim's training", caption="BadNets; marks within a victim.")


def authors_victim(results: Results) -> Table:
    """The defenses on the checkpoint that the authors published."""
    return listing(results, rows(results, "authors-victim", "defense"), {"defense": "Defense"}, name="authors-victim",
                   title="NAD: the defenses on the authors' published victim",
                   caption="BadNets, released settings. The victim is one file for all seeds; a seed fixes the clean "
                           "subset and the order of training.")


def history(results: Results) -> pd.DataFrame:
    """Per-epoch measures of the "curves" runs: defense, seed, run, epoch (0 = before), acc, acc_nontarget, asr, ra."""
    found = []
    for row in measured(results.frame(PAPER, "curves"), "asr").itertuples():
        run = results.named(row.run)
        assert run is not None, f"{row.run} was finished a moment ago"
        lines = [line for line in run.history() if line.get("asr") is not None]
        # NAD's history also has its teacher's epochs; the student's come last.
        found += [{"defense": row.defense, "seed": row.seed, "run": row.run, "status": "done",
                   **{key: line.get(key) for key in ("epoch", "acc", "acc_nontarget", "asr", "ra", "n_clean",
                                                     "n_nontarget")}}
                  for line in lines if line["epoch"] == 0 or line["phase"] == lines[-1]["phase"]]
    return pd.DataFrame(found)


def epochs(results: Results, smoke: bool) -> Table:
    """NAD's own accuracy and ASR after each epoch, beside the log published with the code."""
    frame = history(results)
    caption = "BadNets, released settings; epoch 0 is the victim."
    if not len(frame):
        return table("epochs", "NAD: epoch by epoch", caption, frame, frame, results.frame(PAPER, "curves"))
    measures = ("acc_nontarget", "asr")
    data = estimates(frame, ["epoch", "defense"], measures)
    log = {} if smoke else {int(row[0]): row[1:] for row in published_values()["log"]["rows"]}
    shown = []
    for epoch, part in data.groupby("epoch"):
        cells = {(row.defense, heading(row.measure)): printed(row) for row in part.iloc}
        if log:
            values = log.get(int(epoch), (math.nan, math.nan))
            cells |= {("Published log", heading(measure)): Value(MISSING if math.isnan(value) else f"{value:.2f}")
                      for measure, value in zip(measures, values, strict=True)}
        shown.append({("", "Epoch"): str(int(epoch)), **cells})
    source = published_values()["log"]
    note = f" Published log: {source['source']}. {source['caveat']}" if log else ""
    n = "; ".join(f"{defense} {group.seed.nunique()}" for defense, group in frame.groupby("defense", sort=False))
    return table("epochs", "NAD: epoch by epoch", f"{caption} Seeds: {n}.{note}", grouped(shown), data, frame, SPREAD)


def cost(results: Results) -> Table:
    """Seconds per run, on the hardware they ran on; "Before" is the victim's training."""
    frame = rows(results, "main", "attack", "defense", "variant")
    frame["hardware"] = [_hardware(results, row.run) if row.status == "done" else "" for row in frame.itertuples()]
    frame = measured(frame, "seconds")
    keys = {"defense": "Run", "variant": "Settings", "hardware": "Hardware"}
    data = estimates(frame, list(keys), ["seconds"]) if len(frame) else frame
    shown = [{"Run": "victim's training" if row.defense == BEFORE else row.defense, "Settings": row.variant,
              "Hardware": row.hardware, "Seconds": printed(row, 1), "n": Value(str(row.n))} for row in data.iloc]
    return table("cost", "NAD: cost", "Wall seconds per run without the final evaluation; mean ± sample SD over the n "
                 "runs (attacks and seeds) of the main table. Runs that shared the machine with others took longer "
                 "than they need.", pd.DataFrame(shown), data, frame)


def _hardware(results: Results, name: str) -> str:
    run = results.named(name)
    assert run is not None, f"{name} was finished a moment ago"
    environment = run.json("environment")
    device = environment.get("device", "unknown")
    return f"{environment.get('cpu', 'cpu')}, {environment.get('threads', '?')} threads" if device == "cpu" else device


def published_values() -> dict[str, Any]:
    """What was read in the paper's abstract, its code and its peers, each with its source."""
    return json.loads((PUBLISHED / "nad.json").read_text(encoding="utf-8"))


# A published value with no run of ours to compare it with.
CONTEXT = {"reproduced": math.nan, "sd": math.nan, "n": 0, "gap": math.nan, "low": math.nan, "high": math.nan,
           "text": MISSING, "verdict": "context", "runs": ""}


def published(results: Results, smoke: bool) -> list[Table]:
    """Published values beside reproduced ones, and those of a peer benchmark for context."""
    items = {item: rows(results, item, "attack", "defense", "variant") for item in VICTIMS
             if present(results, PAPER, item)}
    if not items:
        return []
    values = published_values()
    numbers, shown, used = [], [], []
    notes: dict[str, str] = {}
    for entry in values["rows"]:
        cells = [cell for cell in entry["compare"] if cell["item"] in items] or [None]
        for cell in cells:
            part = _cell(items, cell) if cell else None
            ours = MISSING
            if cell:
                labels = [label for label in cell["labels"].values() if label != MISSING]
                ours = f"{' / '.join(labels)}, {VICTIMS[cell['item']]}"
            line = {("", "Source"): entry["source"], ("", "Published as"): entry["what"], ("", "Reproduced as"): ours}
            for measure, value in entry["values"].items():
                row = _gap(part, measure, value, smoke) if entry["compare"] else CONTEXT
                numbers.append({"source": entry["source"], "what": entry["what"], "measure": measure,
                                "published": value, "compared_with": ours, **row, "setting": entry["setting"],
                                "caveat": entry["caveat"]})
                line |= {(heading(measure), "Published"): Value(f"{value:.2f}"),
                         (heading(measure), "Reproduced"): Value(row["text"], runs=tuple(row["runs"].split())),
                         (heading(measure), "Gap"): Value(_signed(row["gap"])),
                         (heading(measure), "Expected"): Value(_bounds(row["low"], row["high"], 1).strip() or MISSING),
                         (heading(measure), "Verdict"): Value(row["verdict"])}
            shown.append({**line, ("", "n"): Value(str(row["n"])),
                          ("", "Note"): Value(notes.setdefault(f"{entry['setting']}. {entry['caveat']}",
                                                               "abcdefghijkl"[len(notes)]))})
            if part is not None:
                used.append(part)
    caption = ("Percent. Gap: reproduced minus published, in points. Verdict: a published value is taken as one run; "
               "it agrees if it lies in the 95 % prediction interval for one more run of ours (\"Expected\"), which is "
               "wide with few seeds: wider than 20 points it decides nothing. Values of the paper's own tables are "
               "absent: the paper's text was not available. "
               + " ".join(f"({key}) {note}" for note, key in notes.items()))
    main = table("published", "NAD: published and reproduced", caption, grouped(shown), pd.DataFrame(numbers),
                 pd.concat(used) if used else next(iter(items.values())).iloc[:0])
    return [main, peers(values["peers"])]


def peers(block: dict[str, Any]) -> Table:
    """A peer benchmark's values, without any comparison."""
    data = pd.DataFrame([{"attack": row["attack"], "defense": row["defense"], **row["values"],
                          "source": block["source"], "setting": block["setting"]} for row in block["rows"]])
    by_attack = {attack: {(row.defense, heading(measure)): Value(f"{row[measure]:.2f}")
                          for row in part.iloc for measure in ("asr", "acc")}
                 for attack, part in data.groupby("attack", sort=False)}
    frame = grouped([{("", "Attack"): attack, **cells} for attack, cells in by_attack.items()])
    return Table("published-peers", f"Context: {block['where']}",
                 f"Published values, percent; nothing here was run by this artifact. {block['setting']}. "
                 f"{block['caveat']} Source: {block['source']}.", frame, data)


def _cell(items: dict[str, pd.DataFrame], cell: dict[str, Any]) -> pd.DataFrame:
    frame = items[cell["item"]]
    for label, value in cell["labels"].items():
        frame = frame[frame[label] == value]
    return frame


def _gap(part: pd.DataFrame | None, measure: str, value: float, smoke: bool) -> dict[str, Any]:
    """Reproduced mean and SD, gap, prediction interval and verdict for one published value."""
    if part is None:
        return CONTEXT | {"verdict": "not run"}
    rows_done = measured(part, measure)
    ours, values = estimate(part, measure), rows_done[measure].to_list()
    expected = prediction_interval(values)
    low, high = max(0.0, expected.low - ROUNDING), min(100.0, expected.high + ROUNDING)
    if not values:
        verdict = "not run"
    elif smoke:
        verdict = "smoke scale: not comparable"
    elif len(values) < 2:
        verdict = "one seed: not judged"
    else:
        verdict = "ours is lower" if high < value else "ours is higher" if low > value else "agrees"
        if verdict == "agrees" and high - low > WIDE:
            verdict = "undecided"
    # At smoke scale the data set is another one: a gap would be a number without meaning.
    gap = math.nan if smoke or not values else ours.mean - value
    return {"reproduced": ours.mean, "sd": ours.sd, "n": ours.n, "text": ours.text(), "gap": gap,
            "low": low if len(values) > 1 else math.nan, "high": high if len(values) > 1 else math.nan,
            "verdict": verdict, "runs": " ".join(rows_done.run)}


def _bounds(low: float, high: float, digits: int, sign: str = "") -> str:
    """ [low, high], or nothing where there is no interval."""
    return "" if math.isnan(low) else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _signed(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:+.2f}"


def _p(value: float) -> str:
    if math.isnan(value):
        return MISSING
    return f"{value:.3f}" if value >= 0.001 else "<0.001"
