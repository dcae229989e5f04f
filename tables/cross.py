"""All defenses on all attacks: the cross tables, ranks with tests, and what each defense costs."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from reproduce.results import Results
from reproduce.statistics import ALPHA, Ranking, ranking
from tables.comparison import if_present, probability, rows
from tables.layout import BEFORE, common, defense_grid, estimates, measured, not_taken, printed, table
from tables.render import MISSING, Table, Value, heading

PAPER = "cross"
REFERENCE = "FT"
MEASURES = ("asr", "acc", "ra")


def tables(results: Results, smoke: bool = False) -> list[Table]:
    """Every table whose entries are at hand."""
    built: list[Table] = []
    for measure in MEASURES:
        built += if_present(results, PAPER, "main", lambda m=measure: defense_grid(
            results, main_rows(results), m, name=m, title="Every defense on every attack",
            caption="The same victims, clean subset and seeds for all."))
    built += if_present(results, PAPER, "main", lambda: ranks(results))
    built += if_present(results, PAPER, "main", lambda: cost(results))
    return [replace(entry, name=f"{PAPER}-{entry.name}") for entry in built if len(entry.frame)]


def main_rows(results: Results) -> pd.DataFrame:
    """One row per (attack, defense, seed)."""
    return rows(results, PAPER, "main", "attack", "defense", "variant")


def ranked(results: Results, measure: str) -> tuple[list[str], Ranking, pd.DataFrame] | None:
    """(defenses, ranking, the runs behind it) over the (attack, seed) pairs all of them finished (see `common`), on
    attacks that took. Rank 1 is best. None with fewer than two defenses or one pair."""
    frame = main_rows(results)
    frame = frame[(frame.defense != BEFORE) & ~frame.attack.isin(not_taken(frame))]
    shared = common(frame, ["defense"], measure)
    names = list(dict.fromkeys(shared.defense))
    if len(names) < 2:
        return None
    wide = shared.pivot_table(index=["attack", "seed"], columns="defense", values=measure, sort=False)[names]
    values = wide.to_numpy() * (1 if measure == "asr" else -1)
    return names, ranking(values), shared


def ranks(results: Results) -> Table:
    """Mean ranks, Friedman's test, and each defense against fine-tuning."""
    shown: dict[str, dict[str, object]] = {}
    numbers, notes, used = [], [], []
    for measure in MEASURES:
        found = ranked(results, measure)
        if found is None:
            continue
        names, result, runs = found
        used.append(runs)
        notes.append(f"{heading(measure)}: Friedman p {equals(result.p)} over {result.blocks} pairs"
                     f"{undecided(result)}.")
        for i, name in enumerate(names):
            p = math.nan
            if REFERENCE in names and name != REFERENCE and result.least < ALPHA:
                j = names.index(REFERENCE)
                p = result.pairs[min(i, j), max(i, j)]
            numbers.append({"defense": name, "measure": measure, "mean_rank": result.ranks[i], "pairs": result.blocks,
                            "friedman_p": result.p, f"p_holm_against_{REFERENCE}": p})
            line = shown.setdefault(name, {"Defense": name})
            line[f"{heading(measure)}: mean rank"] = Value(f"{result.ranks[i]:.2f}")
            line[f"{heading(measure)}: p against {REFERENCE}"] = Value(probability(p))
    return table("ranks", "Every defense on every attack: ranks",
                 "Mean rank over (attack, seed) pairs finished for every defense shown, working backdoors only; 1 is "
                 "lowest ASR, highest ACC or RA. Tests after Demsar (2006): Friedman, then exact Wilcoxon signed-rank "
                 f"tests between all pairs of defenses, Holm-corrected; those against {REFERENCE} are shown, where any "
                 "could be significant. They take the seeds of an attack as independent. " + " ".join(notes),
                 pd.DataFrame(list(shown.values())).fillna(Value(MISSING)), pd.DataFrame(numbers),
                 pd.concat(used) if used else main_rows(results).iloc[:0])


def undecided(result: Ranking) -> str:
    """That so few blocks can tell no two of so many treatments apart, where it is so."""
    return f", too few to tell any two of {len(result.ranks)} defenses apart (p over all pairs cannot fall below " \
        f"{result.least:.2g})" if result.least >= ALPHA else ""


def equals(p: float) -> str:
    """= 0.012, or < 0.001."""
    text = probability(p)
    return text if text.startswith("<") else f"= {text}"


COSTS = {"seconds": ("Seconds", 1), "images": ("Images through the network", 0), "changed": ("Values changed", 0)}


def cost(results: Results, measures: Sequence[str] = tuple(COSTS)) -> Table:
    """Seconds, images that went through the victim or a copy of it, and values of the model that were changed."""
    frame = main_rows(results)
    frame = measured(frame[frame.defense != BEFORE], "seconds")
    infos = [results.finished(name).json("metrics")["info"] for name in frame.run]
    frame = frame.assign(images=[info.get("images_seen", np.nan) for info in infos],
                         changed=[info.get("values_changed", np.nan) for info in infos])
    data = estimates(frame, ["defense"], measures) if len(frame) else pd.DataFrame()
    shown = []
    for defense, part in data.groupby("defense", sort=False) if len(data) else ():
        shown.append({"Defense": defense, **{COSTS[row.measure][0]: printed(row, COSTS[row.measure][1])
                                             for row in part.iloc}, "n": Value(str(int(part.n.max())))})
    return table("cost", "Every defense on every attack: cost",
                 "Mean ± sample SD over n runs (attacks and seeds). Seconds: wall time without the final evaluation, "
                 "what another run did for it included, on the machines named in the report; runs that shared a "
                 "machine took longer than they need. Images: forward passes, in images, of the victim's network and "
                 "its copies. Values changed: weights and BatchNorm statistics that differ from the victim's.",
                 pd.DataFrame(shown), data, frame)
