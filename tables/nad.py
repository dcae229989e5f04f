"""NAD's tables, from the runs of `reproduce.protocols.nad`."""

import math
from dataclasses import replace

import pandas as pd

from reproduce.results import Results
from tables.against_published import published, published_values
from tables.comparison import (
    Factor,
    Study,
    ablation,
    authors_victim,
    clean_fraction,
    cost,
    details,
    grids,
    if_present,
    rows,
)
from tables.layout import SPREAD, estimates, grouped, listing, measured, printed, table
from tables.render import MISSING, Table, Value, heading

PAPER = "nad"
CONTROL = "NAD (beta = 0)"
VARIANTS = ("described", "released")
STUDY = Study(
    PAPER, "NAD", (CONTROL, "FT"),
    {("main", "described"): ("main", "attacks and defenses as described"),
     ("main", "released"): ("main-released-defenses", "attacks as described, defenses with released settings"),
     ("main-released", "released"): ("main-released", "attacks and defenses as in the released code")},
    {"main": "attacks as described", "main-released": "attacks as in the released code"})
FACTORS = (
    Factor("attention", "attention", "Attention function",
           "After the scaling to unit norm, sum and mean are the same map."),
    Factor("distillation", "distillation", "Distillation", "What the student is made to copy."),
    Factor("teacher", "teacher", "Teacher", "Whose attention the student copies."),
    Factor("beta", "beta", "Factor on beta", "Weight of the distillation terms, as a factor on the released betas."),
    Factor("variants", "variant", "Variant", "Described and released settings side by side."),
)
# Items that hold runs to compare with the authors' own numbers, and on whose victim.
VICTIMS = {"authors-victim": "authors' victim", "main": "our victim", "variants": "our victim"}


def tables(results: Results, smoke: bool = False) -> list[Table]:
    """Every table whose entries are at hand, in the report's order. At smoke scale nothing is compared with a paper."""
    built = grids(results, STUDY) + published(results, PAPER, STUDY.name, VICTIMS, smoke) + details(results, STUDY)
    built += clean_fraction(results, STUDY)
    for factor in FACTORS:
        built += ablation(results, STUDY, factor)
    built += if_present(results, PAPER, "augmentation", lambda: augmentation(results))
    built += if_present(results, PAPER, "mcr", lambda: curve_finding(results))
    built += authors_victim(results, STUDY)
    built += if_present(results, PAPER, "curves", lambda: epochs(results, smoke))
    built += if_present(results, PAPER, "main", lambda: cost(results, STUDY))
    return [replace(entry, name=f"{PAPER}-{entry.name}") for entry in built if len(entry.frame)]


def augmentation(results: Results) -> Table:
    """Victims trained with and without augmentation."""
    return listing(results, rows(results, PAPER, "augmentation", "victim", "defense"),
                   {"victim": "Victim's training", "defense": "Defense"}, within=["victim"], name="augmentation",
                   title="NAD: augmentation in the victim's training", caption="BadNets; marks within a victim.")


def curve_finding(results: Results) -> Table:
    """MCR with its images shown once an epoch, as in the main table, and as its own code shows them."""
    return listing(results, rows(results, PAPER, "mcr", "attack", "defense"),
                   {"attack": "Attack", "defense": "Defense"}, within=["attack"], name="mcr",
                   title="NAD: how long MCR trains its curve",
                   caption="MCR's own code shows its images without augmentation and over and over, 79 steps an epoch; "
                           "the main table's MCR crops and flips them and shows each once, 16 steps an epoch at 5 % of "
                           "CIFAR-10. Both end on the victim fine-tuned as in row FT, without the images held out; "
                           "marks within an attack.")


def history(results: Results) -> pd.DataFrame:
    """Per-epoch measures of the "curves" runs: defense, seed, run, epoch (0 = before), acc, acc_nontarget, asr, ra."""
    found = []
    for row in measured(results.frame(PAPER, "curves"), "asr").itertuples():
        run = results.finished(row.run)
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
    log = {} if smoke else {int(row[0]): row[1:] for row in published_values(PAPER)["log"]["rows"]}
    shown = []
    for epoch, part in data.groupby("epoch"):
        cells = {(row.defense, heading(row.measure)): printed(row) for row in part.iloc}
        if log:
            values = log.get(int(epoch), (math.nan, math.nan))
            cells |= {("Published log", heading(measure)): Value(MISSING if math.isnan(value) else f"{value:.2f}")
                      for measure, value in zip(measures, values, strict=True)}
        shown.append({("", "Epoch"): str(int(epoch)), **cells})
    source = published_values(PAPER)["log"]
    note = f" Published log: {source['source']}. {source['caveat']}" if log else ""
    n = "; ".join(f"{defense} {group.seed.nunique()}" for defense, group in frame.groupby("defense", sort=False))
    return table("epochs", "NAD: epoch by epoch", f"{caption} Seeds: {n}.{note}", grouped(shown), data, frame, SPREAD)
