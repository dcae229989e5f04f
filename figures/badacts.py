"""BadActs' figures, from the runs of `reproduce.protocols.badacts`."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas
from sklearn.metrics import roc_curve

from figures.comparison import ablation, comparisons, if_present, number
from figures.style import (
    BARS,
    Figure,
    done,
    legend,
    lines,
    look,
    panels,
    seeds,
    tiles,
    trade_offs,
)
from reproduce.protocols.badacts import METHOD, PAPER, STATISTICS, detection, purification
from reproduce.results import Results
from reproduce.store import Run
from tables.badacts import FACTORS, ON, datasets, study
from tables.comparison import Factor, rows
from tables.layout import BEFORE, measured
from tables.render import MISSING

# Factors drawn as lines, with what is drawn of them and the label of the axis; the others are dots.
SWEPT = {"deviations": (("auroc", "far", "frr"), "k"), "frr": (("acc", "asr", "far"), "FRR wanted (%)"),
         "validation": (("acc", "asr"), "share of the validation split (%)"),
         "poison-rate": (("acc", "asr"), "training set poisoned (%)")}
QUANTILES = {"median": 0.5, "99th percentile": 0.99, "largest": 1.0}


def figures(results: Results, smoke: bool = False) -> list[Figure]:
    """Every figure whose runs are at hand; of one data set, the first."""
    names = datasets(results)
    built: list[Figure] = []
    if names:
        purified, detected = purification(names[0]), detection(names[0])
        whole = study(results)
        first = replace(whole, main={key: value for key, value in whole.main.items() if key[0] == purified})
        built += comparisons(results, first)
        for item, draw in ((purified, trade_off), (detected, suspicion), (detected, roc), (purified, widths),
                           (purified, activations)):
            built += if_present(results, PAPER, item, lambda d=draw: d(results, names[0]))
        for factor in FACTORS:
            if factor.item in SWEPT:
                built += if_present(results, PAPER, factor.item, lambda f=factor: swept(results, f))
            else:
                built += ablation(results, whole, factor)
    return [replace(figure, name=f"{PAPER}-{figure.name}") for figure in built]


def trade_off(results: Results, dataset: str) -> Figure | None:
    """ASR against ACC of every row of the purification table."""
    frame = rows(results, PAPER, purification(dataset), "attack", "defense", "variant")
    # One run of mu ± 3 sigma stands in the comparison of both variants.
    frame = frame.drop_duplicates(["attack", "defense", "run"])
    frame["defense"] = frame.defense.where(frame.variant.isin(["released", MISSING]),
                                           frame.defense + ", " + frame.variant)
    data = done(frame, ["attack", "defense"], ("asr", "acc"))
    if not len(data):
        return None
    return Figure("trade-off", f"BadActs: ASR against ACC, {dataset}",
                  "Best is top left; ASR on a square-root scale; ACC is the paper's CACC. "
                  f"{BARS} {seeds(data)}.", lambda: trade_offs(data, "attack", "defense"), data, seeds(data))


def _detectors(results: Results, dataset: str) -> Iterator[tuple[str, str, str, Run]]:
    """(attack, detector, variant, run of its first finished seed)."""
    frame = measured(rows(results, PAPER, detection(dataset), "attack", "defense", "variant"), "auroc")
    for row in frame.drop_duplicates(["attack", "defense", "variant"]).itertuples():
        yield row.attack, row.defense, row.variant, results.finished(row.run)


def suspicion(results: Results, dataset: str) -> Figure | None:
    """How suspicious clean and triggered sentences are to BadActs."""
    parts, thresholds = [], {}
    for attack, defense, _variant, run in _detectors(results, dataset):
        found = run.detection()
        if defense != METHOD or found is None:
            continue
        thresholds[attack] = run.json("metrics")["info"]["threshold"]
        parts += [pd.DataFrame({"attack": attack, "run": run.name, "kind": kind, "suspicion": values,
                                "threshold": thresholds[attack]})
                  for kind, values in (("clean", found.clean), ("triggered", found.triggered))]
    if not parts:
        return None
    data = pd.concat(parts)

    def draw() -> Canvas:
        names = list(thresholds), "share of abnormal activations (1 - NAS)", "sentences (%)"
        with tiles(*names) as (figure, axes):
            # The longest tail of a few sentences would squeeze everything else.
            edges = np.linspace(data.suspicion.min(), max(data.suspicion.quantile(0.995), *thresholds.values()), 41)
            for axis, (attack, threshold) in zip(axes, thresholds.items(), strict=True):
                for kind, colour in (("clean", "0.55"), ("triggered", look(METHOD)[0])):
                    values = data.suspicion[(data.attack == attack) & (data.kind == kind)].clip(upper=edges[-1])
                    axis.hist(values, edges, weights=np.full(len(values), 100 / len(values)), color=colour, alpha=0.6,
                              label=kind)
                axis.axvline(threshold, color="firebrick", linewidth=1, linestyle="--", label="threshold (5 % FRR)")
            legend(figure, axes[0], 3)
        return figure

    return Figure("suspicion", f"BadActs: suspicion of clean and triggered sentences, {dataset}",
                  "Share of the [CLS] activations of all layers outside mu ± 3 sigma, test sentences of one seed; "
                  "percent of each kind. The last bar holds all that are beyond it.", draw, data, "one seed")


def roc_points(clean: np.ndarray, triggered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FRR and detection rate (percent) from flagging nothing to flagging everything; points between which the curve
    keeps its direction are left out."""
    frr, detected, _ = roc_curve(np.repeat([0, 1], [len(clean), len(triggered)]), np.concatenate([clean, triggered]))
    return 100 * frr, 100 * detected


def roc(results: Results, dataset: str) -> Figure | None:
    """ROC curves of all detectors."""
    curves: dict[str, list[tuple[str, str, np.ndarray, np.ndarray]]] = {}
    parts = []
    for attack, defense, variant, run in _detectors(results, dataset):
        found = run.detection()
        if found is None or not len(found.triggered):
            continue
        frr, detected = roc_points(found.clean, found.triggered)
        curves.setdefault(attack, []).append((defense, variant, frr, detected))
        parts.append(pd.DataFrame({"attack": attack, "detector": defense, "settings": variant, "run": run.name,
                                   "frr": frr.round(3), "detected": detected.round(3)}))
    if not parts:
        return None

    def draw() -> Canvas:
        names = list(curves), "clean flagged (FRR, %)", "triggered flagged (%)"
        with tiles(*names, height=1.9, extra=1.0) as (figure, axes):
            for axis, found in zip(axes, curves.values(), strict=True):
                for i, (defense, variant, frr, detected) in enumerate(found):
                    plain = variant == "released"
                    axis.plot(frr, detected, color=look(defense, i)[0], linestyle="-" if plain else "--",
                              label=defense if plain else f"{defense}, {variant}")
                axis.plot([0, 100], [0, 100], color="0.7", linewidth=0.8, linestyle=":", zorder=0)
            legend(figure, max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1])), 6)
        return figure

    return Figure("roc", f"BadActs: ROC curves of the detectors, {dataset}", "All test sentences of one seed. Dotted: "
                  "chance.", draw, pd.concat(parts), "one seed")


def _runs(results: Results, dataset: str, defenses: Sequence[str]) -> dict[str, Run]:
    """Released runs of these defenses on the attack of the ablations, of the first seed that has them all."""
    frame = rows(results, PAPER, purification(dataset), "attack", "defense", "variant")
    frame = frame[(frame.attack == ON) & frame.defense.isin(defenses) & frame.variant.isin(["released", MISSING])
                  & (frame.status == "done")]
    for _seed, part in frame.groupby("seed"):
        if set(part.defense) == set(defenses):
            return {row.defense: results.finished(row.run) for row in part.itertuples()}
    return {}


def widths(results: Results, dataset: str) -> Figure | None:
    """How wide the intervals are, layer by layer: optimised ones and mu ± 3 sigma."""
    parts = []
    for defense, run in _runs(results, dataset, (METHOD, STATISTICS)).items():
        tensors = run.tensors("defense")
        values = (tensors["upper"] - tensors["lower"]).numpy()
        parts.append(pd.DataFrame({"defense": defense, "run": run.name,
                                   "layer": np.repeat(np.arange(1, len(values) + 1), values.shape[1]),
                                   "unit": np.tile(np.arange(values.shape[1]), len(values)), "width": values.ravel()}))
    if not parts:
        return None
    data = pd.concat(parts)

    def draw() -> Canvas:
        with panels(2.3, [""]) as (figure, (axis,)):
            layers = sorted(set(data.layer))
            for i, name in enumerate((METHOD, STATISTICS)):
                part = data[data.defense == name]
                colour = look(name)[0]
                box = axis.boxplot([part.width[part.layer == layer] for layer in layers],
                                   positions=[layer + (i - 0.5) * 0.34 for layer in layers], widths=0.28,
                                   whis=(1, 99), patch_artist=True, showfliers=False,
                                   # The median stands out on both colours, and on a box that is hardly there.
                                   boxprops={"facecolor": colour, "edgecolor": colour, "linewidth": 0.8},
                                   medianprops={"color": "orange", "linewidth": 1.0},
                                   whiskerprops={"color": colour}, capprops={"color": colour})
                box["boxes"][0].set_label(name)
            axis.set(xlabel="encoder layer", ylabel="width of the interval")
            axis.set_ylim(bottom=0)
            axis.set_xticks(layers, map(str, layers))
            axis.grid(axis="x", visible=False)
            legend(figure, axis, 2)
        return figure

    return Figure("interval-widths", f"BadActs: how wide the intervals are, {dataset}",
                  f"{ON}, one seed. Upper minus lower bound over the units of a layer: box, quartiles and median; "
                  "whiskers, 1st to 99th percentile.", draw, data, "one seed")


def activations(results: Results, dataset: str) -> Figure | None:
    """[CLS] activations of one sentence, with the trigger and after BadActs, layer by layer."""
    runs = _runs(results, dataset, (BEFORE, METHOD))
    if not runs:
        return None
    samples = runs[METHOD].arrays("samples")
    kinds = {"clean": "cls_clean", "triggered": "cls_triggered", "triggered, purified": "cls_triggered_after"}
    if not len(samples["triggered"]) or not set(kinds.values()) <= set(samples):
        return None
    data = pd.DataFrame([
        {"sentence": kind, "layer": layer, "quantile": name, "activation": float(np.quantile(np.abs(row), share))}
        for kind, key in kinds.items() for layer, row in enumerate(samples[key][0].astype(np.float32), 1)
        for name, share in QUANTILES.items()]).assign(run=runs[METHOD].name)
    looks = {"clean": ("0.55", "o", "-"), "triggered": ("firebrick", "s", "-"),
             "triggered, purified": (look(METHOD)[0], "X", "--")}

    def draw() -> Canvas:
        with panels(2.1, list(QUANTILES)) as (figure, axes):
            for axis, name in zip(axes, QUANTILES, strict=True):
                for kind, (colour, marker, style) in looks.items():
                    part = data[(data.sentence == kind) & (data["quantile"] == name)]
                    axis.plot(part.layer, part.activation, color=colour, marker=marker, linestyle=style, label=kind)
                top = data.activation[data["quantile"] == name].max()
                axis.set(xlabel="encoder layer", title=name, ylim=(0, 1.1 * top or 1))
                axis.set_xticks(sorted(set(data.layer)))
            axes[0].set_ylabel("|activation| of [CLS]")
            legend(figure, axes[0], len(looks))
        return figure

    sentence = textwrap.shorten(str(samples["triggered"][0]), 160, placeholder=" ...")
    return Figure("activations", f"BadActs: activations of one sentence, {dataset}",
                  f"{ON}, one seed; over the units of a layer, after it. Purified activations are those under the "
                  f"clamp of all layers. The triggered sentence: \"{sentence}\"", draw, data, "one seed")


def swept(results: Results, factor: Factor) -> Figure | None:
    """One factor varied, as lines."""
    measures, label = SWEPT[factor.item]
    x = factor.within[0] if factor.within else factor.label
    frame = rows(results, PAPER, factor.item, x, "defense")
    frame["defense"] = frame.defense.replace(MISSING, METHOD)
    data = done(frame, [x, "defense"], measures)
    if not len(data):
        return None
    values = sorted(set(data[x]), key=number)
    data = data.assign(order=data[x].map(values.index)).sort_values(["defense", "measure", "order"], kind="stable")
    # The axis says the unit, so that its ticks have room.
    places = [value.removesuffix(" %") for value in values]
    shown = data.assign(place=data[x].map(dict(zip(values, places, strict=True))))
    return Figure(factor.item, f"BadActs: {factor.name}", f"{factor.on}. {factor.caption} Not to scale. {BARS} "
                  f"(AUROC with one seed: Hanley and McNeil's.) {seeds(data)}.",
                  lambda: lines(shown, "place", "defense", measures, label, places), data.drop(columns="order"),
                  seeds(data))
