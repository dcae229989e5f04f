"""FMP's tables, from the runs of `reproduce.protocols.fmp`."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from defenses.fmp import FAULTS
from reproduce.protocols.fmp import BEFORE_ANY, METHOD, NO_PRUNING, NOT_OF_WIDE_RESNET, PAPER, RANDOM, unpoisoned
from reproduce.results import Results
from reproduce.statistics import over_groups
from reproduce.store import Run
from tables.comparison import (
    Factor,
    Study,
    ablation,
    clean_fraction,
    cost,
    details,
    grids,
    if_present,
    rows,
)
from tables.layout import differences, grouped, mean_difference, measured, over_attacks, pairs, table
from tables.paired import against, tested
from tables.render import MISSING, Table, Value, bounds, heading

ALL = "all"
DATASETS = {"main": "all attacks", "cifar100": "CIFAR-100", "gtsrb": "GTSRB", "tiny-imagenet": "Tiny-ImageNet"}
STUDY = Study(
    PAPER, METHOD, (NO_PRUNING, RANDOM, "FT"),
    {**{(item, variant): (item + ("" if variant == "described" else f"-{variant}"),
                          f"{name}, FMP as {variant}") for item, name in DATASETS.items()
        for variant in ("described", "released")},
     ("five-percent", "released"): ("five-percent", "FMP with 10 % clean data, the others with 5 %")},
    {**DATASETS, "five-percent": "5 % clean data for the others"}, tall=True, grid=("asr", "excess", "acc", "ra"),
    measures="RA: share of triggered images that get their true label. ACC non-target leaves the target class out.",
    floor={item: unpoisoned(item) for item in DATASETS})
CLEAN = "Every defender has 10 % clean data."
OWN_SHARES = ("five-percent", "clean-fraction")     # tables of which that is not true
SHOWN = ("acc", "asr", "ra")
EACH_FAULT = "Each fault of the released script added to the described method and taken from the released one"
CHECKPOINTS = "the WRN-16-1 checkpoints that the authors of NAD, ARGD and MCLDef published"
FACTORS = (
    Factor("epsilon", "epsilon", "Epsilon", "Start noise and step of the feature reverse generation, of a pixel's "
           "range.", measures=SHOWN),
    Factor("p", "share", "Maps pruned", "In every convolution, relative to the count of the main table.",
           measures=SHOWN),
    Factor("images", "images", "Scoring images", "On which the maps are scored.", measures=SHOWN),
    Factor("tuning", "tuning", "Fine-tuning epochs", "After the pruning.", measures=SHOWN),
    Factor("poison-rate", "defense", "Defense", "The share of the training set that is poisoned.",
           within=("rate", "Poison rate"), measures=SHOWN),
    Factor("faults", "faults", "Faults", f"{EACH_FAULT}.", within=("attack", "Attack"), on="Several attacks",
           measures=SHOWN),
    Factor("published-faults", "faults", "Faults", f"{EACH_FAULT}; both with the choice of maps replaced, or none; "
           "the described one with all clean images scoring, where the scale has fewer score.",
           within=("attack", "Checkpoint"), measures=SHOWN,
           on=f"BadNets, on {CHECKPOINTS}; two of the faults, {' and '.join(NOT_OF_WIDE_RESNET)}, are none on their "
              "network, and normalised is one on MCLDef's alone",
           called="faults, on published checkpoints"),
)
_ROWS = {"attack": "Attack", "defense": "Defense", "settings": "Settings"}
CARRIERS = {     # {item: (table name, whose maps, {label: heading} of its rows)}
    "main": ("carriers", "", _ROWS),
    "gtsrb": ("carriers-gtsrb", " on GTSRB", _ROWS),
    "published-faults": ("carriers-published", " on published checkpoints",
                         {"attack": "Checkpoint", "faults": "Settings"})}
# {item: (table name, what its victims are)}
FAULTS_ON = {"faults": ("worth", "own victims"), "published-faults": ("worth-published", "published checkpoints")}
# What the choice of maps is worth: (the method, the same without its choice)
CHOICE = (("described", "described, no pruning"), ("released", "released, no pruning"),
          ("described", "described, random maps"), ("described", "described, least active maps"))


def tables(results: Results, smoke: bool = False) -> list[Table]:
    """Every table whose entries are at hand, in the report's order."""
    built = grids(results, STUDY)
    for item in FAULTS_ON:
        built += if_present(results, PAPER, item, lambda one=item: worth(results, one))
    built += if_present(results, PAPER, "published-faults", lambda: choice(results))
    built += if_present(results, PAPER, "published-faults", lambda: again(results))
    for item in CARRIERS:
        built += if_present(results, PAPER, item, lambda one=item: carriers(results, one))
    built += details(results, STUDY) + clean_fraction(results, STUDY)
    for factor in FACTORS:
        built += ablation(results, STUDY, factor)
    built += if_present(results, PAPER, "main", lambda: cost(results, STUDY))
    return [replace(entry, name=f"{PAPER}-{entry.name}", caption=entry.caption if entry.name.startswith(OWN_SHARES)
                    else f"{entry.caption} {CLEAN}") for entry in built if len(entry.frame)]


def worth(results: Results, item: str) -> Table:
    """What each fault does, as a difference to the same method with and without it; per attack and over all."""
    name, victims = FAULTS_ON[item]
    factor = next(one for one in FACTORS if one.item == item)
    assert factor.within
    frame = rows(results, PAPER, item, "attack", "faults")
    numbers, shown = [], []
    for attack, part in [*frame.groupby("attack", sort=False), *([(ALL, frame)] if frame.attack.nunique() > 1 else [])]:
        settings = dict(iter(part.groupby("faults", sort=False)))
        for fault in (name for name in FAULTS if f"described + {name}" in settings):
            line: dict[tuple[str, str], object] = {("", factor.within[1]): str(attack), ("", "Fault"): fault}
            for kind, first, second in (("Added to described", f"described + {fault}", "described"),
                                        ("Left in released", "released", f"released - {fault}")):
                for measure in SHOWN:
                    paired = pairs(settings[first], settings[second], measure)
                    line[kind, heading(measure)] = Value(MISSING)
                    if paired and (attack != ALL or len(differences(paired)) == frame.attack.nunique()):
                        gap = (over_attacks(paired, measure) if attack == ALL else
                               mean_difference(results, paired, measure))
                        runs = tuple(name for pair in paired for name in (pair.run_first, pair.run_second))
                        line[kind, heading(measure)] = Value(
                            f"{gap.mean:+.1f}{bounds(gap.low, gap.high, 1, '+')}", runs=runs)
                        numbers.append({"attack": attack, "fault": fault, "comparison": kind, "measure": measure,
                                        "difference": gap.mean, "low": gap.low, "high": gap.high, "n": len(paired),
                                        "runs": " ".join(runs)})
            shown.append(line)
    return table(name, f"FMP: what each fault of the released script is worth, {victims}",
                 f"{factor.on}. Points by which a fault changes a measure: the method with it minus the same without, "
                 "paired by seed; 95 % interval over seeds, with one seed over test images; over all, where it "
                 "ran on all, over the attacks' means.",
                 grouped(shown) if numbers else pd.DataFrame(), pd.DataFrame(numbers), frame)


def choice(results: Results) -> Table:
    """FMP against the same fine-tuning after no pruning, or after another choice of as many maps."""
    frame = rows(results, PAPER, "published-faults", "attack", "faults")
    compared = [{"settings": method, "control": control, **against(
        results, frame[frame.faults == method], frame[frame.faults == control], measure)}
        for method, control in CHOICE for measure in ("asr", "acc")]
    return tested("choice-published", "FMP: what pruning and the choice of maps are worth, published checkpoints",
                  f"BadNets, on {CHECKPOINTS}. FMP minus the control on the same checkpoint", compared,
                  {"settings": "FMP", "control": "Control"}, frame, group="a checkpoint")


def again(results: Results) -> Table:
    """Whether the same maps of one network are chosen at another seed, which draws other images and other noise."""
    frame = rows(results, PAPER, "published-faults", "attack", "faults")
    done = frame[(frame.status == "done") & (frame.faults != BEFORE_ANY)]
    numbers = [{"checkpoint": checkpoint, "settings": settings, "first": int(first.seed), "second": int(second.seed),
                "runs": f"{first.run} {second.run}", **shared}
               for (settings, checkpoint), part in done.groupby(["faults", "attack"], sort=False)
               for first, second in combinations(part.itertuples(), 2)
               if (shared := _shared(*(results.finished(one.run) for one in (first, second))))]
    data = pd.DataFrame(numbers)
    shown = []
    for settings, of_settings in data.groupby("settings", sort=False) if numbers else ():
        parts = [*of_settings.groupby("checkpoint", sort=False)]
        for checkpoint, part in [*parts, *([(ALL, of_settings)] if len(parts) == frame.attack.nunique() > 1 else [])]:
            groups = [one for _, one in part.groupby("checkpoint", sort=False)]
            cells = {}
            for title, key, digits in (("Chosen again (%)", "same", 1), ("Expected at random (%)", "chance", 1),
                                       ("Rank correlation", "correlation", 2)):
                mean = over_groups([one[key].to_list() for one in groups])
                between = bounds(mean.low, mean.high, digits) if checkpoint == ALL and key != "chance" else ""
                cells[title] = Value(MISSING if math.isnan(mean.mean) else f"{mean.mean:.{digits}f}{between}",
                                     runs=tuple(dict.fromkeys(" ".join(part.runs).split())))
            shown.append({"Settings": settings, "Checkpoint": checkpoint,
                          "Maps pruned": Value(f"{part.pruned.mean():.0f}"), **cells,
                          "Pairs of seeds": Value(str(len(part)))})
    return table("again-published", "FMP: are the same maps chosen again?",
                 f"BadNets, on {CHECKPOINTS}: one network, two seeds, which draw clean subset and noise. "
                 "Chosen again: the share of the pruned maps that are pruned at the other seed, too. Rank correlation: "
                 "Spearman's, of the scores of all maps of a convolution, mean over convolutions. Means over pairs of "
                 "seeds; over all, over the checkpoints' means, with Student's 95 % interval.",
                 pd.DataFrame(shown), data, done)


def _shared(first: Run, second: Run) -> dict[str, float]:
    """How much two runs on the same weights agree on what to prune, in percent, and on the order of the maps; empty
    unless both ranked them."""
    kept = [_kept(first), _kept(second)]
    if not all("scores" in tensors for tensors in kept):
        return {}
    layer, pruned, total = kept[0]["layer"], kept[0]["pruned"], int(kept[0]["pruned"].sum())
    scores = [tensors["scores"] for tensors in kept]
    # Of a convolution whose maps all score the same there is no order.
    ranked = [part for part in _convolutions(layer) if all(np.ptp(values[part]) for values in scores)]
    return {"pruned": total, "same": 100 * int((pruned & kept[1]["pruned"]).sum()) / total,
            "chance": _chance(layer, pruned),
            "correlation": float(np.mean([spearmanr(*(values[part] for values in scores)).statistic
                                          for part in ranked])) if ranked else math.nan}


def carriers(results: Results, item: str) -> Table:
    """How many of the pruned maps are those that the trigger moves most."""
    name, where, keys = CARRIERS[item]
    frame = rows(results, PAPER, item, *keys)
    victims = results.victims(PAPER, item)
    numbers = []
    for line in frame[frame.status == "done"].itertuples():
        victim = victims.get((line.attack, line.seed))
        run = results.finished(line.run)
        if victim is None or not (found := pruned_maps(victim, run)):
            continue
        numbers.append({**{key: getattr(line, key) for key in keys}, "seed": line.seed, "run": line.run,
                        **_overlap(*found), "ties": _ties(run)})
    data = pd.DataFrame(numbers)
    shown = []
    for of_row, part in data.groupby(list(keys), sort=False) if numbers else ():
        shown.append({**dict(zip(keys.values(), of_row, strict=True)), **{
            title: Value(MISSING if part[key].isna().all() else f"{part[key].mean():.{digits}f}", runs=tuple(part.run))
            for title, key, digits in (("Maps pruned", "pruned", 0), ("Decided by ties (%)", "ties", 1),
                                       ("Carriers among them (%)", "hits", 1), ("Expected at random (%)", "chance", 1),
                                       ("Change of pruned maps", "change_pruned", 2),
                                       ("Change of all maps", "change_all", 2))}, "n": Value(str(len(part)))})
    return table(name, f"FMP: do the pruned maps carry the backdoor{where}?",
                 "Change: how far the trigger moves a map of the victim, in standard deviations of the map on clean "
                 "test images. Carriers: in each convolution, as many of the maps with the largest change as are "
                 "pruned there. Means over seeds; measured with the trigger, which the defender does not have. Decided "
                 "by ties: the share of the pruned maps that score like one of their convolution that was spared, so "
                 "that not the score but their number chose them; random maps have none.",
                 pd.DataFrame(shown), data, measured(frame, "asr"))


def pruned_maps(victim: Run, run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(change by the trigger, number of the convolution, pruned or not) of every map that could be pruned; None for a
    run that pruned none, or a victim trained before changes were recorded."""
    samples = victim.arrays("samples")
    tensors = _kept(run)
    if "map_change" not in samples or "pruned" not in tensors or not tensors["pruned"].any():
        return None
    names, layer = samples["map_layers"].tolist(), samples["map_layer"]
    wanted = [names.index(name) for name in run.json("metrics")["info"]["layers"]]
    change = np.concatenate([samples["map_change"][layer == one] for one in wanted])
    return change, np.array(wanted)[tensors["layer"]], tensors["pruned"]


def _kept(run: Run) -> dict[str, np.ndarray]:
    """What a run of FMP keeps of each map; nothing of other runs."""
    kept = run.tensors("defense") if (run.path / "defense.safetensors").exists() else {}
    return {name: tensor.numpy() for name, tensor in kept.items()}


def _convolutions(layer: np.ndarray) -> list[np.ndarray]:
    """Which maps are a convolution's, for each of them."""
    return [layer == one for one in np.unique(layer)]


def _chance(layer: np.ndarray, pruned: np.ndarray) -> float:
    """The share, in percent, of the pruned maps that as many drawn at random of each convolution have on average."""
    shared = sum(int(pruned[part].sum()) ** 2 / int(part.sum()) for part in _convolutions(layer))
    return 100 * shared / int(pruned.sum())


def _ties(run: Run) -> float:
    """Of the pruned maps the share, in percent, whose score one of their convolution that was spared has too; NaN where
    nothing was scored. Where scores are rotated each convolution's are used by one of as many maps, so the share
    is that of the scores as they were used."""
    tensors = _kept(run)
    if "scores" not in tensors:
        return math.nan
    tied = 0
    for part in _convolutions(tensors["layer"]):
        count = int(tensors["pruned"][part].sum())
        scores = np.sort(tensors["scores"][part])
        tied += int((scores[:count] == scores[count]).sum()) if count < len(scores) else 0
    return 100 * tied / int(tensors["pruned"].sum())


def _overlap(change: np.ndarray, layer: np.ndarray, pruned: np.ndarray) -> dict[str, float]:
    """Shares in percent; chance: the mean of a random choice of as many maps per layer."""
    hits = 0
    for part in _convolutions(layer):
        top = np.argsort(-change[part], kind="stable")[:int(pruned[part].sum())]
        hits += int(pruned[part][top].sum())
    total = int(pruned.sum())
    return {"pruned": total, "hits": 100 * hits / total, "chance": _chance(layer, pruned),
            "change_pruned": float(change[pruned].mean()), "change_all": float(change.mean())}
