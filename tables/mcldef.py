"""MCLDef's tables, from the runs of `reproduce.protocols.mcldef`."""

from dataclasses import replace

import numpy as np
import pandas as pd

from reproduce.protocols.mcldef import CROSS_ENTROPY, ESTIMATED, METHOD, PAPER, RANDOM
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
from tables.layout import counts, estimates, printed, table
from tables.render import MISSING, Table, Value

STUDY = Study(
    PAPER, "MCLDef", (RANDOM, CROSS_ENTROPY, "FT"),
    {("main", "released"): ("main", "defenses as released"),
     ("main-released", "released"): ("main-released", "attacks and defenses as in released code"),
     ("gtsrb", "released"): ("gtsrb", "GTSRB, defenses as released"),
     ("resnet-18", "released"): ("resnet-18", "ResNet-18, defenses as released")},
    {"main": "all attacks", "main-released": "attacks as in the released code", "gtsrb": "GTSRB",
     "resnet-18": "ResNet-18"}, tall=True)
FACTORS = (
    Factor("temperature", "temperature", "Temperature", "Of the contrastive loss; released: 0.5."),
    Factor("inversion", "inversion", "Inversion", "How the trigger that stage 2 unlearns is found."),
    Factor("variants", "variant", "Variant", "Described and released settings side by side."),
    Factor("anp-threshold", "threshold", "ANP's threshold", "The same mask, cut at another threshold. Choosing by test "
           "ASR, as one peer does, is no defense: it shows what the mask could do.", within=("attack", "Attack"),
           on="Every attack"),
)
# Items that hold runs to compare with the authors' own numbers, and on whose victim.
VICTIMS = {"authors-victim": "authors' victim", "main": "our victim", "main-released": "our victim, trained as theirs",
           "inversion": "our victim"}


def tables(results: Results, smoke: bool = False) -> list[Table]:
    """Every table whose entries are at hand, in the report's order. At smoke scale nothing is compared with a paper."""
    built = grids(results, STUDY) + published(results, PAPER, STUDY.name, VICTIMS, smoke)
    built += if_present(results, PAPER, "main", lambda: triggers(results))
    built += if_present(results, PAPER, "main", lambda: target_class(results))
    built += details(results, STUDY) + clean_fraction(results, STUDY)
    for factor in FACTORS:
        built += ablation(results, STUDY, factor)
    built += authors_victim(results, STUDY)
    built += if_present(results, PAPER, "main", lambda: cost(results, STUDY))
    return [replace(entry, name=f"{PAPER}-{entry.name}") for entry in built if len(entry.frame)]


def triggers(results: Results) -> Table:
    """What the inversions found: whether the target estimated is the true one, and how large the triggers are."""
    frame = rows(results, PAPER, "main", "attack", "defense", "variant")
    frame = frame[frame.defense.isin(["NC", METHOD, ESTIMATED, RANDOM]) & (frame.status == "done")]
    numbers = []
    for line in frame.itertuples():
        run = results.finished(line.run)
        info = run.json("metrics")["info"]
        wanted = int(run.predictions().wanted[0])
        numbers.append({
            "attack": line.attack, "defense": line.defense, "seed": line.seed, "run": line.run,
            "target": info["target"], "true_target": wanted,
            "estimated": info["target_from"] == "estimated", "right": info["target"] == wanted,
            "anomaly_index": info.get("anomaly_index", np.nan), "reached": info.get("reached", np.nan),
            "changed_pixels": info.get("changed_pixels", np.nan), "l1": info.get("l1", np.nan),
            "success": info.get("success", np.nan)})
    data = pd.DataFrame(numbers)
    shown = []
    for (attack, defense), part in data.groupby(["attack", "defense"], sort=False) if numbers else ():
        right = f"{int(part.right.sum())} of {len(part)}" if part.estimated.all() else "told"
        shown.append({"Attack": attack, "Defense": defense, "Target right": Value(right, runs=tuple(part.run)),
                      "Anomaly index": _mean(part.anomaly_index, 2), "Inversion succeeded": _share(part.reached),
                      "Pixels": _mean(part.changed_pixels, 0), "L1 norm": _mean(part.l1, 1),
                      "Success (%)": _mean(part.success, 1), "n": Value(str(len(part)))})
    return table("triggers", "MCLDef: the inverted triggers",
                 "Means over seeds. Target right: how often the label found is the attack's. Anomaly index: Neural "
                 "Cleanse's, above 2 a backdoor is suspected. Success: share of the clean subset's images of other "
                 "classes that the inverted trigger sends to the target. A random trigger has the pixels of the "
                 "inverted one in other places.", pd.DataFrame(shown), data, frame)


def target_class(results: Results) -> Table:
    """Accuracy on clean images of the target class, which MCLDef's own accuracy leaves out."""
    frame = rows(results, PAPER, "main", "attack", "defense", "variant")
    frame = frame[frame.status == "done"].copy()
    frame["target_acc"] = [_target_accuracy(results, name) for name in frame.run]
    data = estimates(frame, ["attack", "defense"], ["target_acc"])
    shown = []
    for defense, part in data.groupby("defense", sort=False):
        shown.append({"Defense": defense, **{row.attack: printed(row, 1) for row in part.iloc},
                      "n": Value(counts(part.n.to_list()))})
    return table("target-class", "MCLDef: accuracy on the target class",
                 "Percent of the clean test images of the target class that are classified correctly, mean ± sample SD "
                 "over seeds. The accuracy of MCLDef's, ARGD's and NAD's code is measured on the other classes alone.",
                 pd.DataFrame(shown).fillna(Value(MISSING)), data, frame)


def _target_accuracy(results: Results, name: str) -> float:
    run = results.finished(name)
    predictions = run.predictions()
    right = predictions.hits()["acc"]
    others = np.zeros(len(right), dtype=bool)
    others[predictions.index] = True
    return 100 * float(right[~others].mean())


def _mean(values: pd.Series, digits: int) -> Value:
    return Value(MISSING if values.isna().all() else f"{values.mean():.{digits}f}")


def _share(values: pd.Series) -> Value:
    return Value(MISSING if values.isna().all() else f"{int(values.sum())} of {len(values)}")
