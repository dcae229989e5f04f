"""ARGD's tables, from the runs of `reproduce.protocols.argd`."""

from dataclasses import replace

import pandas as pd

from reproduce.protocols.argd import CONTROL, NODES, PAPER
from reproduce.results import Results
from tables.against_published import published
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
from tables.layout import SPREAD, estimates, printed, table
from tables.render import Table, Value

STUDY = Study(
    PAPER, "ARGD", (NODES, CONTROL, "FT"),
    {("main", "described"): ("main", "NAD's victims, ARGD as described"),
     ("main-released", "released"): ("main-released", "attacks, teacher and ARGD as in its released code")},
    {"main": "NAD's victims", "main-released": "attacks as in the released code"})
FACTORS = (
    Factor("teacher", "defense", "Defense", "Whose attention the student copies.", within=("teacher", "Teacher")),
    Factor("terms", "terms", "Terms", "Which terms of the loss are in, and with what weight."),
    Factor("variants", "variant", "Variant", "Described and released settings side by side."),
)
# Items that hold runs to compare with the authors' own numbers, and on whose victim.
VICTIMS = {"authors-victim": "authors' victim", "main": "our victim", "main-released": "our victim"}


def tables(results: Results, smoke: bool = False) -> list[Table]:
    """Every table whose entries are at hand, in the report's order. At smoke scale nothing is compared with a paper."""
    built = grids(results, STUDY) + published(results, PAPER, STUDY.name, VICTIMS, smoke) + details(results, STUDY)
    built += clean_fraction(results, STUDY)
    for factor in FACTORS:
        built += ablation(results, STUDY, factor)
    built += authors_victim(results, STUDY)
    built += if_present(results, PAPER, "main", lambda: term_sizes(results))
    built += if_present(results, PAPER, "main", lambda: cost(results, STUDY))
    return [replace(entry, name=f"{PAPER}-{entry.name}") for entry in built if len(entry.frame)]


def term_sizes(results: Results) -> Table:
    """How large each term of ARGD's loss is, weights included, in the first and in the last epoch of the student."""
    frame = rows(results, PAPER, "main", "attack", "defense", "variant")
    frame = frame[(frame.defense == "ARGD") & (frame.status == "done")]
    found = []
    for line in frame.itertuples():
        run = results.finished(line.run)
        epochs = [row for row in run.history() if row["phase"] == "student"]
        for when, row in (("first", epochs[0]), ("last", epochs[-1])):
            nodes = sum(value for key, value in row.items() if key.startswith("node."))
            sizes = {"ce": row["ce"], "nodes": nodes, "edge": row.get("edge", 0.0),
                     "embedding": row.get("embedding", 0.0)}
            found.append({"attack": line.attack, "when": when, "seed": line.seed, "run": line.run, "status": "done",
                          **sizes, "ratio": 100 * (sizes["edge"] + sizes["embedding"]) / nodes})
    parts = pd.DataFrame(found)
    measures = {"ce": "Cross-entropy", "nodes": "Nodes", "edge": "Edges", "embedding": "Embedding",
                "ratio": "Edges and embedding, % of nodes"}
    data = estimates(parts, ["attack", "when"], list(measures)) if found else parts
    shown = []
    for (attack, when), part in data.groupby(["attack", "when"], sort=False) if found else ():
        shown.append({"Attack": attack, "Epoch": when, **{measures[row.measure]: printed(row, 4) for row in part.iloc},
                      "n": Value(str(int(part.n.max())))})
    return table("term-sizes", "ARGD: how large the terms of its loss are",
                 "Mean over the epoch's batches, weights included, described settings: a term that is a thousandth of "
                 "another hardly steers the student.", pd.DataFrame(shown), data, frame,
                 SPREAD.replace("Percent, mean", "Mean"))
