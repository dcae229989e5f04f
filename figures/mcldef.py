"""MCLDef's figures, from the runs of `reproduce.protocols.mcldef`."""

from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from figures.comparison import (
    AMPLIFIED,
    ablation,
    authors_victim,
    bare,
    clean_fraction,
    comparisons,
    gallery,
    if_present,
    number,
)
from figures.style import BARS, Figure, canvas, done, lines, seeds
from reproduce.protocols.mcldef import METHOD, PAPER
from reproduce.results import Results
from tables.comparison import rows
from tables.layout import BEFORE
from tables.mcldef import FACTORS, STUDY

PROJECTED = (BEFORE, "FT", METHOD)


def figures(results: Results, smoke: bool = False) -> list[Figure]:
    """Every figure whose runs are at hand."""
    built = comparisons(results, STUDY) + authors_victim(results, STUDY)
    for item in ("main", "main-released"):
        built += if_present(results, PAPER, item, lambda item=item: gallery(results, STUDY, item))
    built += if_present(results, PAPER, "main", lambda: inverted(results))
    built += if_present(results, PAPER, "main", lambda: projection(results, smoke))
    built += if_present(results, PAPER, "clean-fraction", lambda: clean_fraction(results, STUDY))
    built += if_present(results, PAPER, "temperature", lambda: temperature(results))
    for factor in FACTORS:
        if factor.item != "temperature":
            built += ablation(results, STUDY, factor)
    return [replace(figure, name=f"{PAPER}-{figure.name}") for figure in built]


def temperature(results: Results) -> Figure | None:
    """ASR and ACC against the temperature."""
    data = done(rows(results, PAPER, "temperature", "temperature"), ["temperature"], ("asr", "acc"))
    if not len(data):
        return None
    values = sorted(set(data.temperature), key=number)
    data = data.assign(series=METHOD, order=data.temperature.map(values.index)).sort_values(["measure", "order"])
    return Figure("temperature", "MCLDef: temperature", f"BadNets; of the contrastive loss, not to scale. {BARS} "
                  f"{seeds(data)}.",
                  lambda: lines(data, "temperature", "series", ("asr", "acc"), "temperature", values),
                  data.drop(columns="order"), seeds(data))


def _finished(results: Results, *defenses: str) -> pd.DataFrame:
    """These rows of the main table, as far as they are finished."""
    frame = rows(results, PAPER, "main", "attack", "defense", "variant")
    return frame[frame.defense.isin(defenses) & (frame.status == "done")]


def inverted(results: Results) -> Figure | None:
    """The inverted trigger beside the true one."""
    shown = []
    for line in _finished(results, METHOD).drop_duplicates("attack").itertuples():
        run = results.finished(line.run)
        samples, trigger = run.arrays("samples"), run.tensors("defense")["trigger"].numpy()
        true = samples["triggered"][0].astype(int) - samples["images"][0]
        shown.append((line.attack, line.run, true, np.rint(255 * trigger).astype(int)))
    if not shown:
        return None
    data = pd.DataFrame([{"attack": attack, "run": run, "trigger": kind, "changed_pixels": int(values.any(0).sum()),
                          "mean_abs_residual": float(np.abs(values).mean())}
                         for attack, run, *both in shown
                         for kind, values in zip(("true", "inverted"), both, strict=True)])

    def draw() -> Canvas:
        figure = canvas(2.2)
        axes = figure.subplots(2, len(shown), squeeze=False)
        for column, (attack, _run, *both) in enumerate(shown):
            for axis, values in zip(axes[:, column], both, strict=True):
                picture = np.clip(128 + AMPLIFIED * values, 0, 255).astype(np.uint8)
                axis.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
                bare(axis)
            axes[0, column].set_title(attack)
        for axis, label in zip(axes[:, 0], ("true", "inverted"), strict=True):
            axis.set_ylabel(label)
        return figure

    return Figure("inverted", "MCLDef: inverted triggers beside the true ones",
                  f"Change of a test image by the true trigger, and the signed trigger that stage 1 found, both × "
                  f"{AMPLIFIED} around mid-grey. Plain grey: the inversion found none.", draw, data)


def projection(results: Results, smoke: bool, attack: str = "BadNets") -> Figure | None:
    """Features of clean and triggered images in the plane, before and after; of the first seed that has most of them,
    for runs made by earlier code have none."""
    frame = _finished(results, *PROJECTED)
    stored: dict[int, dict[str, tuple[str, dict[str, np.ndarray]]]] = {}
    for line in frame[frame.attack == attack].itertuples():
        arrays = results.finished(line.run).arrays("samples")
        if "features_triggered" in arrays:
            stored.setdefault(line.seed, {}).setdefault(line.defense, (line.run, arrays))
    seed = max((seed for seed in stored if METHOD in stored[seed]), key=lambda one: len(stored[one]), default=None)
    found = stored.get(seed, {})
    if not found:
        return None
    method = "PCA" if smoke else "t-SNE"
    parts = []
    for defense in (name for name in PROJECTED if name in found):
        run, arrays = found[defense]
        both = np.concatenate([arrays["features_clean"], arrays["features_triggered"]]).astype(np.float64)
        project = PCA(2, svd_solver="full") if smoke else TSNE(2, init="pca", random_state=0, perplexity=20)
        count = len(arrays["features_clean"])
        label = [*map(str, arrays["feature_labels"]), *["triggered"] * (len(both) - count)]
        parts.append(pd.DataFrame({"defense": defense, "run": run, "label": label, **dict(
            zip("xy", project.fit_transform(both).T, strict=True))}))
    data = pd.concat(parts)

    def draw() -> Canvas:
        figure = canvas(2.3)
        names = list(dict.fromkeys(data.defense))
        for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            part = data[data.defense == name]
            clean, triggered = part[part.label != "triggered"], part[part.label == "triggered"]
            axis.scatter(clean.x, clean.y, c=clean.label.astype(int), cmap="tab10", s=9, linewidth=0)
            axis.scatter(triggered.x, triggered.y, c="black", marker="x", s=11, linewidth=0.7)
            axis.set_title(name)
            bare(axis)
        return figure

    return Figure("features", f"MCLDef: features of clean and triggered images ({attack}, seed {seed})",
                  f"{method} of the classifier's input; dots: clean test images, coloured by class; crosses: triggered "
                  "ones, which the true classes should absorb. Each panel is projected by itself, so places do not "
                  "compare between panels.", draw, data)
