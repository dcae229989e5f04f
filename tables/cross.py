"""All defenses on all attacks: the cross tables, ranks with tests, what each defense costs, and what it does to a
network without a backdoor."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from defenses.nc import THRESHOLD
from reproduce.protocols.cross import FMP, NO_BACKDOOR, PAPER, UNPOISONED
from reproduce.results import Results
from reproduce.statistics import ALPHA, Ranking, holm, ranking
from tables.comparison import if_present, rows, with_never_poisoned
from tables.layout import (
    BEFORE,
    common,
    compare,
    defense_grid,
    estimates,
    mean_difference,
    measured,
    not_taken,
    pairs,
    printed,
    table,
)
from tables.render import MISSING, Table, Value, bounds, heading, probability

REFERENCE = "FT"
GRIDS = ("asr", "excess", "acc", "ra")
MEASURES = ("asr", "acc", "ra")     # that defenses are ranked by


def tables(results: Results, smoke: bool = False) -> list[Table]:
    """Every table whose entries are at hand."""
    built: list[Table] = []
    for measure in GRIDS:
        built += if_present(results, PAPER, "main", lambda m=measure: defense_grid(
            results, with_never_poisoned(results, main_rows(results), PAPER, UNPOISONED), m, name=m,
            title="Every defense on every attack", caption="The same victims, clean subset and seeds for all. FMP "
            f"scores its maps on {FMP.config.images} of the clean images, where the method has all of them do it."))
    built += if_present(results, PAPER, "main", lambda: ranks(results))
    built += if_present(results, PAPER, "main", lambda: cost(results))
    built += if_present(results, PAPER, NO_BACKDOOR, lambda: no_backdoor(results))
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


def no_backdoor(results: Results) -> Table:
    """What each defense does to the accuracy of a network that was never attacked, and whether it suspects one."""
    frame = rows(results, PAPER, NO_BACKDOOR, "attack", "defense", "variant")
    before = frame[frame.defense == BEFORE]
    data = estimates(frame, ["defense"], ["acc"])
    parts = [measured(frame[frame.defense == defense], "acc") for defense in data.defense]
    data = data.join(pd.DataFrame([change(results, part, before) | suspicion(results, part) for part in parts]))
    data["p_holm"] = holm(data.p.to_list())
    shown = []
    for row in data.iloc:
        moved = Value(f"{row.change:+.2f}{bounds(row.change_low, row.change_high, 2, '+')}")
        looked = {"Anomaly index": Value(f"{row.anomaly_index:.2f}"),
                  "Suspects a backdoor": Value(f"{row.suspected} of {row.looked}")}
        shown.append({"Defense": row.defense, "ACC": printed(row),
                      "Change": Value(MISSING) if math.isnan(row.change) else moved,
                      "p (Holm)": Value(probability(row.p_holm)),
                      **(looked if row.looked else dict.fromkeys(looked, Value(MISSING))), "n": Value(str(row.n))})
    return table(NO_BACKDOOR, "Every defense on a network without a backdoor",
                 "Trained as the victims are, on the same images, none of them poisoned. Change: ACC after minus "
                 "before, in points, with a 95 % interval over seeds (paired t test), of one seed over test images "
                 "(exact McNemar test); Holm over the table. Anomaly index: Neural Cleanse's, of the class with the "
                 f"smallest mask, mean over seeds; how often it is above {THRESHOLD:g}, which says that there is a "
                 "backdoor. Only defenses that look for one have it.", pd.DataFrame(shown), data, frame)


def change(results: Results, part: pd.DataFrame, before: pd.DataFrame) -> dict[str, float]:
    """ACC of a defense's runs minus that of the networks they began with: mean, 95 % interval, p."""
    both = pairs(part[part.defense != BEFORE], before, "acc")
    if not both:
        return dict.fromkeys(("change", "change_low", "change_high", "p"), math.nan)
    found = mean_difference(results, both, "acc")
    return {"change": found.mean, "change_low": found.low, "change_high": found.high,
            "p": compare(results, part, before, "acc").p}


def suspicion(results: Results, part: pd.DataFrame) -> dict[str, float | int | str]:
    """How many of a defense's runs looked for a backdoor, their mean index, how many found one, and which labels."""
    infos = [results.finished(name).json("metrics")["info"] for name in part.run]
    looked = [info for info in infos if "anomaly_index" in info]
    found = [info for info in looked if info["anomaly_index"] > THRESHOLD]
    return {"looked": len(looked), "suspected": len(found), "labels": " ".join(str(info["target"]) for info in found),
            "anomaly_index": float(np.mean([info["anomaly_index"] for info in looked])) if looked else math.nan}
