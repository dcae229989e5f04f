"""FMP's figures, from the runs of `reproduce.protocols.fmp`."""

from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from figures.comparison import ablation, clean_fraction, comparisons, gallery, if_present
from figures.style import BARS, LABELS, Figure, canvas, done, dots, legend, look, marks, panels, seeds, widened
from reproduce.protocols.fmp import METHOD, PAPER
from reproduce.results import Results
from tables.comparison import Factor, main_rows, rows
from tables.fmp import CLEAN, FACTORS, FAULTS_ON, STUDY, pruned_maps
from tables.layout import averages

MAPS_ON = 3     # attacks shown in the picture of maps


def figures(results: Results, smoke: bool = False) -> list[Figure]:
    """Every figure whose runs are at hand."""
    built = comparisons(results, STUDY)
    built += if_present(results, PAPER, "main", lambda: gallery(results, STUDY, "main"))
    built += if_present(results, PAPER, "main", lambda: maps(results))
    for item in STUDY.items:
        built += if_present(results, PAPER, item, lambda one=item: trade_off(results, one))
    built += if_present(results, PAPER, "clean-fraction", lambda: clean_fraction(results, STUDY))
    for factor in FACTORS:
        built += (if_present(results, PAPER, factor.item, lambda one=factor: faults(results, one))
                  if factor.item in FAULTS_ON else ablation(results, STUDY, factor))
    return [replace(figure, name=f"{PAPER}-{figure.name}") for figure in built]


def maps(results: Results) -> Figure | None:
    """Every map of every convolution by how far the trigger moves it; the pruned ones marked."""
    frame = rows(results, PAPER, "main", "attack", "defense", "variant")
    frame = frame[(frame.defense == METHOD) & (frame.status == "done")]
    victims = results.victims(PAPER, "main")
    parts = []
    for line in frame.drop_duplicates(["attack", "variant"]).itertuples():
        victim = victims.get((line.attack, line.seed))
        found = pruned_maps(victim, results.finished(line.run)) if victim else None
        if found:
            change, layer, pruned = found
            parts.append(pd.DataFrame({"attack": line.attack, "variant": line.variant, "run": line.run,
                                       "layer": layer + 1, "change": change, "pruned": pruned}))
    if not parts:
        return None
    data = pd.concat(parts)
    attacks = list(dict.fromkeys(data.attack))[:MAPS_ON]
    variants = list(dict.fromkeys(data.variant))
    data = data[data.attack.isin(attacks)]

    def draw() -> Canvas:
        figure = canvas(0.7 + 1.5 * len(variants))
        grid = figure.subplots(len(variants), len(attacks), sharex=True, sharey=True, squeeze=False)
        for line, variant in zip(grid, variants, strict=True):
            for axis, attack in zip(line, attacks, strict=True):
                part = data[(data.attack == attack) & (data.variant == variant)]
                kept, cut = part[~part.pruned], part[part.pruned]
                axis.scatter(kept.layer, kept.change, s=3, color="0.7", linewidth=0, label="kept")
                axis.scatter(cut.layer, cut.change, s=9, color=look(METHOD)[0], marker="x", linewidth=0.8,
                             label="pruned")
                if part.empty:
                    axis.text(0.5, 0.5, "not run", color="0.5", ha="center", va="center", transform=axis.transAxes)
                axis.set_title(f"{attack}, {variant}")
                axis.set_yscale("log")
                axis.xaxis.get_major_locator().set_params(integer=True)
        for axis in grid[-1]:
            axis.set_xlabel("convolution")
        for axis in grid[:, 0]:
            axis.set_ylabel("change by the trigger")
        legend(figure, grid[0, 0], 2)
        return figure

    return Figure("maps", "FMP: which maps are pruned",
                  "Each dot is a feature map; height: how far the trigger moves it, in standard deviations on clean "
                  "test images. If FMP found the maps that carry the backdoor, the crosses would be on top. First "
                  "finished seed.", draw, data)


def faults(results: Results, factor: Factor) -> Figure | None:
    """Every setting between the described and the released one, an attack's in one colour."""
    keys = ["faults", "attack"]
    data = done(rows(results, PAPER, factor.item, *keys), keys, ("asr", "acc"))
    if not len(data):
        return None
    return Figure(factor.item, f"FMP: the faults of the released script, {FAULTS_ON[factor.item][1]}",
                  f"{factor.on}. {factor.caption} {CLEAN} {BARS} {seeds(data)}.",
                  lambda: dots(data, "faults", "attack", ("asr", "acc")), data, seeds(data))


def trade_off(results: Results, item: str) -> Figure | None:
    """Mean over attacks of ASR against ACC, and against RA, a mark per defense."""
    parts = []
    for variant in STUDY.variants:
        frame = main_rows(results, STUDY, item, variant)
        if len(frame):
            parts.append(frame.assign(settings=variant))
    if not parts:
        return None
    frame = pd.concat(parts)
    # Most baselines stand in both variants with the same runs.
    differs = frame.groupby(["attack", "defense", "seed"]).run.transform("nunique") > 1
    named = frame.defense.isin([METHOD, *frame[differs].defense])
    frame["series"] = np.where(named, frame.defense + ", " + frame.settings, frame.defense)
    frame = frame.drop_duplicates(["attack", "series", "seed"])
    measures = ("asr", "acc", "ra")
    data = averages(frame, ["series"], measures)
    if not len(data):
        return None
    data = data[data.attacks == "all"].drop(columns="attacks")
    # Over fewer attacks, some erased and some not, nearly every interval goes from 0 to 100 and hides everything else.
    data.loc[data.n_attacks < 6, ["low", "high"]] = np.nan

    def draw() -> Canvas:
        with panels(3.2, measures[1:]) as (figure, axes):
            for axis, measure in zip(axes, measures[1:], strict=True):
                marks(axis, data, "series", list(dict.fromkeys(data.series)), measure)
                axis.set(xlabel=LABELS["asr"], ylabel=LABELS[measure], ylim=widened(axis.get_ylim()))
            legend(figure, axes[0], data.series.nunique())
        return figure

    attacks = int(data.n_attacks.max())
    return Figure(f"trade-off{'' if item == 'main' else f'-{item}'}",
                  f"FMP: trade-off on {STUDY.attacks[item]}",
                  f"Means over {attacks} attacks; bars: Student's 95 % intervals over attacks, from six "
                  "on. Best is top left; ASR on a square-root scale.", draw, data)
