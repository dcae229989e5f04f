"""NAD's figures, from the runs of `reproduce.protocols.nad`."""

from dataclasses import replace

import pandas as pd
from matplotlib.figure import Figure as Canvas

from figures.comparison import (
    ablation,
    attention_maps,
    authors_victim,
    clean_fraction,
    comparisons,
    gallery,
    if_present,
    number,
)
from figures.style import BARS, Figure, done, dots, lines, seeds
from reproduce.results import Results
from tables.against_published import published_values
from tables.comparison import rows
from tables.nad import CONTROL, FACTORS, PAPER, STUDY, history


def figures(results: Results, smoke: bool = False) -> list[Figure]:
    """Every figure whose runs are at hand. At smoke scale nothing published is drawn in."""
    built = comparisons(results, STUDY) + authors_victim(results, STUDY)
    built += if_present(results, PAPER, "clean-fraction", lambda: clean_fraction(results, STUDY))
    built += if_present(results, PAPER, "beta", lambda: beta(results))
    built += if_present(results, PAPER, "curves", lambda: training_curves(results, smoke))
    for factor in FACTORS:
        if factor.item != "beta":
            built += ablation(results, STUDY, factor)
    built += if_present(results, PAPER, "augmentation", lambda: augmentation(results))
    for item in STUDY.items:
        built += if_present(results, PAPER, item, lambda i=item: gallery(results, STUDY, i))
    built += if_present(results, PAPER, "main", lambda: attention_maps(results, STUDY, ("FT", CONTROL, "NAD")))
    return [replace(figure, name=f"{PAPER}-{figure.name}") for figure in built]


def beta(results: Results) -> Figure | None:
    """ASR and ACC against the weight of the distillation terms."""
    data = done(rows(results, PAPER, "beta", "beta"), ["beta"], ("asr", "acc")).assign(series="NAD")
    if not len(data):
        return None
    factors = sorted(set(data.beta), key=number)
    data = data.assign(order=data.beta.map(factors.index)).sort_values(["measure", "order"]).drop(columns="order")
    return Figure("beta", "NAD: weight of the distillation terms", "BadNets; factor on the released betas, not to "
                  f"scale; 0 is fine-tuning on the same schedule. {BARS} {seeds(data)}.",
                  lambda: lines(data, "beta", "series", ("asr", "acc"), "factor on beta", factors), data, seeds(data))


def training_curves(results: Results, smoke: bool) -> Figure | None:
    """Accuracy and ASR after each epoch of the defense, with the log published beside the code."""
    frame = history(results)
    if not len(frame):
        return None
    data = done(frame, ["epoch", "defense"], ("asr", "acc_nontarget"))
    log = pd.DataFrame() if smoke else pd.DataFrame(published_values(PAPER)["log"]["rows"],
                                                    columns=published_values(PAPER)["log"]["columns"])

    def draw() -> Canvas:
        figure = lines(data, "epoch", "defense", ("asr", "acc_nontarget"), "epoch", band=True)
        for axis, measure in zip(figure.axes, ("asr", "acc_nontarget"), strict=True):
            if len(log):
                # An underscore keeps the log out of the legend, which is drawn already: the caption names it.
                axis.plot(log.epoch, log[measure], color="0.2", linestyle=":", linewidth=1, label="_published")
            axis.xaxis.get_major_locator().set_params(integer=True)
        return figure

    note = f" Dotted: {published_values(PAPER)['log']['source']}, one run." if len(log) else ""
    return Figure("curves", "NAD: epoch by epoch", "BadNets, released settings; epoch 0 is the victim. Lines: means "
                  f"over seeds. {BARS.replace('Bars', 'Bands')} {seeds(data)}.{note}", draw, data, seeds(data))


def augmentation(results: Results) -> Figure | None:
    """Victims trained with and without augmentation."""
    data = done(rows(results, PAPER, "augmentation", "victim", "defense"), ["victim", "defense"], ("asr", "acc"))
    if not len(data):
        return None
    return Figure("augmentation", "NAD: augmentation in the victim's training", f"BadNets. {BARS} {seeds(data)}.",
                  lambda: dots(data, "victim", "defense", ("asr", "acc")), data, seeds(data))
