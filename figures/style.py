"""The shared look of all figures, and how they are written: PDF, PNG and the data behind them as CSV."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from tables.layout import BEFORE, DETECTION, estimates
from tables.render import SMOKE, heading

matplotlib.use("Agg")

WIDTH = 5.5     # inches: the text width of a one-column paper
DPI = 200
_COLOURS = seaborn.color_palette("colorblind")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SETTINGS = {
    **seaborn.axes_style("whitegrid"), **seaborn.plotting_context("paper"), "font.family": "DejaVu Sans",
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5, "legend.title_fontsize": 7.5, "legend.frameon": False, "axes.linewidth": 0.6,
    "grid.linewidth": 0.5, "grid.color": "0.9", "lines.linewidth": 1.2, "lines.markersize": 4,
    "pdf.fonttype": 42, "figure.constrained_layout.use": True,
}
LABELS = {measure: f"{heading(measure)} (%)" for measure in ("asr", "base_rate", "acc", "acc_nontarget", "ra",
                                                          *DETECTION)}
# The same defense looks the same in every figure of every paper.
LOOKS = {BEFORE: ("0.45", "o"), **{name: (_COLOURS[colour], marker) for name, colour, marker in (
    ("FT", 2, "s"), ("FP", 4, "^"), ("MCR", 5, "v"), ("NAD (beta = 0)", 0, "D"), ("NAD", 3, "P"),
    ("NAD, betas 2000/5000/2000", 8, "<"), ("ARGD without distillation", 9, "D"), ("ARGD", 1, "X"),
    ("I-BAU", 9, "h"), ("NC", 8, ">"),
    ("CUBE", 5, "p"), ("ONION", 3, "^"), ("Word drop", 8, "v"), ("STRIP", 9, "D"), ("RAP", 1, "h"), ("DAN", 4, ">"))},
    "MCLDef": ("#4b1d6b", "X"), "MCLDef, random trigger": ("#c3a0dc", "o"),
    "MCLDef, cross-entropy": ("#8e5bb8", "d"), "MCLDef, target estimated": ("#6a3a94", "*"),
    "I-BAU, notebook": ("#1b5e80", "v"), "ANP": ("#5c7a29", "p"), "CLP": (_COLOURS[6], "<"), "RNP": ("#0b6e6e", "d"),
    "FT-SAM": (_COLOURS[2], "*"),
    "FMP": ("#7a1f1f", "D"), "FMP, described": ("#7a1f1f", "D"), "FMP, released": ("#7a1f1f", "P"),
    "FMP, no pruning": ("#e0b3a6", "o"), "FMP, no pruning, described": ("#e0b3a6", "o"),
    "FMP, no pruning, released": ("#c98a75", "^"), "FMP, random maps": ("#cf8a78", "d"),
    "FMP, least active maps": ("#b05a48", "s"),
    "BadActs": ("#0a2f6b", "X"), "BadActs, described": ("#0a2f6b", "+"), "BadActs, flagged only": ("#1f4f9c", "P"),
    "BadActs, flagged rejected": ("#1f4f9c", "*"), "BadActs, mu ± 3 sigma": ("#7fa4dd", "o"),
    "BadActs, not optimised": ("#a9c3ea", "s"), "BadActs, dealt anew": ("#5580c2", "d"),
    "BadActs, [CLS] only": ("#3f69ad", "<")}
SPAN = 10           # percentage points that an axis shows at least
LEGEND_WIDTH = 80   # characters in one line of a legend
BARS = "Bars: 95 % t intervals over seeds; with two seeds from one to the other; with one its Wilson interval."


@dataclass(frozen=True)
class Figure:
    """draw makes the picture; data is everything shown in it; note, the number of seeds say, stands above it."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Canvas]
    data: pd.DataFrame
    note: str = ""

    def write(self, folder: Path, smoke: bool = False) -> None:
        """<folder>/<name>.pdf, .png and .csv, the same bytes for the same data; labelled at smoke scale."""
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(SETTINGS):
            canvas = self.draw()
            above = "   ".join(filter(None, [self.note, SMOKE if smoke else ""]))
            if above:
                canvas.suptitle(above, x=0.995, ha="right", fontsize=7.5, color="firebrick" if smoke else "0.35")
            # Laid out once for both files; one pass leaves long labels cut off.
            for _ in range(2):
                canvas.get_layout_engine().execute(canvas)
            canvas.set_layout_engine("none")
            # Without these dates and version stamps two writes of one figure are identical.
            canvas.savefig(folder / f"{self.name}.pdf", metadata={"CreationDate": None, "ModDate": None})
            canvas.savefig(folder / f"{self.name}.png", metadata={"Software": None})
        note = f"# {SMOKE}\n" if smoke else ""
        body = self.data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        (folder / f"{self.name}.csv").write_text(note + body, encoding="utf-8")


def look(name: str, position: int = 0) -> tuple[object, str]:
    """(colour, marker) of a defense, or of the n-th of other labels."""
    return LOOKS.get(name, (_COLOURS[position % len(_COLOURS)], _MARKERS[position % len(_MARKERS)]))


def canvas(height: float) -> Canvas:
    """An empty figure of the text width; height in inches."""
    return Canvas(figsize=(WIDTH, height), dpi=DPI)


@contextmanager
def panels(height: float, measures: Sequence[str], share_y: bool = False) -> Iterator[tuple[Canvas, list[Axes]]]:
    """Side-by-side axes, one per measure."""
    figure = canvas(height)
    axes = figure.subplots(1, len(measures), sharey=share_y, squeeze=False)[0]
    yield figure, list(axes)


@contextmanager
def tiles(titles: Sequence[str], xlabel: str, ylabel: str, height: float = 1.5, columns: int = 2, extra: float = 0.7
          ) -> Iterator[tuple[Canvas, list[Axes]]]:
    """A grid of axes that share both scales, each with its title; `height` of a row and `extra` of all, in inches."""
    lines_ = -(-len(titles) // columns)
    figure = canvas(extra + height * lines_)
    grid = figure.subplots(lines_, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for place, (axis, title) in enumerate(zip(grid, titles, strict=False)):
        axis.set_title(title)
        lowest = place + columns >= len(titles)     # of its column, though another row may follow
        axis.tick_params(labelbottom=lowest)
        axis.set(xlabel=xlabel if lowest else "", ylabel="" if place % columns else ylabel)
    for axis in grid[len(titles):]:
        axis.remove()
    yield figure, list(grid[:len(titles)])


def seeds(data: pd.DataFrame) -> str:
    """n behind the points: "n = 6 seeds" or "n = 2 to 6 seeds"."""
    low, high = int(data.n.min()), int(data.n.max())
    return f"n = {low} seed{'s' * (low != 1)}" if low == high else f"n = {low} to {high} seeds"


def done(frame: pd.DataFrame, keys: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """Estimates of the groups that have a finished run, with the interval to draw; the first key's values in the order
    of the protocol, whichever of their runs are there.

    The t interval of two seeds is 13 standard errors wide and would hide everything else: their range is drawn instead.
    """
    data = estimates(frame, keys, measures)
    order = {value: number for number, value in enumerate(dict.fromkeys(data[keys[0]]))}
    data = data[data.n > 0].drop(columns="mark").sort_values(
        keys[0], key=lambda column: column.map(order), kind="stable", ignore_index=True)
    two = data.n == 2
    half = data.sd[two] / 2 ** 0.5
    data.loc[two, "low"], data.loc[two, "high"] = data["mean"][two] - half, data["mean"][two] + half
    data.loc[two, "interval"] = "range"
    return data


def errors(part: pd.DataFrame) -> list[pd.Series]:
    """Distances from the mean to the ends of the interval, for errorbar; 0 where there is none."""
    return [(part["mean"] - part.low).clip(lower=0).fillna(0), (part.high - part["mean"]).clip(lower=0).fillna(0)]


def dots(data: pd.DataFrame, row: str, series: str | None, measures: Sequence[str], ylabel: str = "") -> Canvas:
    """Horizontal dot plot: a line per `row`, a dot per `series` in it, a panel per measure, 95 % intervals.

    ylabel: what the rows are, where they do not say it themselves.
    """
    rows = list(dict.fromkeys(data[row]))
    names = list(dict.fromkeys(data[series])) if series else [""]
    labels = [textwrap.fill(value, 26) for value in rows]
    lines_high = max(len(names), *(label.count("\n") + 1 for label in labels))
    height = max(1.5, 0.75 + len(rows) * (0.13 * lines_high + 0.14))
    with panels(height, measures, share_y=True) as (figure, axes):
        for axis, measure in zip(axes, measures, strict=True):
            for i, name in enumerate(names):
                part = data[(data.measure == measure) & ((data[series] == name) if series else True)]
                offset = (i - (len(names) - 1) / 2) * 0.75 / len(names)
                colour, marker = look(name, i)
                axis.errorbar(part["mean"], [rows.index(value) + offset for value in part[row]], xerr=errors(part),
                              fmt=marker, color=colour, elinewidth=0.9, label=name)
            axis.set(xlabel=LABELS[measure], ylim=(len(rows) - 0.5, -0.5))
            axis.set_yticks(range(len(rows)), labels)
            axis.grid(axis="y", visible=False)
            for edge in range(1, len(rows)):
                axis.axhline(edge - 0.5, color="0.9", linewidth=0.5)
        axes[0].set_ylabel(ylabel)
        limits(axes, measures)
        if series:
            legend(figure, axes[0], len(names))
    return figure


def seed_dots(data: pd.DataFrame, runs: pd.DataFrame, theirs: pd.DataFrame, row: str,
              measures: Sequence[str]) -> Canvas:
    """A line per `row`, a panel per measure: the mean with its interval, below it a faint dot per run, above it a
    triangle for each published value. runs, theirs: columns `row`, measure, value."""
    figure = dots(data, row, None, measures)
    names = list(dict.fromkeys(data[row]))

    def scatter(axis: Axes, part: pd.DataFrame, raised: float, **style: object) -> None:
        axis.scatter(part.value, [names.index(name) - raised for name in part[row]], linewidth=0, **style)

    for axis, measure in zip(figure.axes, measures, strict=True):
        scatter(axis, runs[runs.measure == measure], -0.27, s=9, color="0.2", alpha=0.35, zorder=1)
        scatter(axis, theirs[theirs.measure == measure], 0.3, s=22, marker="v", color="crimson", zorder=3)
    limits(figure.axes, measures)
    return figure


def lines(data: pd.DataFrame, x: str, series: str, measures: Sequence[str], xlabel: str,
          categories: Sequence[str] | None = None, band: bool = False) -> Canvas:
    """A line per `series` over x (numbers, or named `categories` in order), a panel per measure, 95 % intervals."""
    names = list(dict.fromkeys(data[series]))
    with panels(2.4, measures) as (figure, axes):
        for axis, measure in zip(axes, measures, strict=True):
            for i, name in enumerate(names):
                part = data[(data.measure == measure) & (data[series] == name)]
                colour, marker = look(name, i)
                # Neighbouring series are moved apart a little so that their error bars stay legible.
                shift = 0.0 if band else (i - (len(names) - 1) / 2) * 0.08
                places = part[x] if categories is None else part[x].map(list(categories).index)
                if band:
                    axis.plot(places, part["mean"], color=colour, marker=marker, markersize=3, label=name)
                    below, above = errors(part)
                    axis.fill_between(places, part["mean"] - below, part["mean"] + above, color=colour, alpha=0.15,
                                      linewidth=0)
                else:
                    axis.errorbar(places + shift, part["mean"], yerr=errors(part), color=colour, marker=marker,
                                  elinewidth=0.9, label=name)
            axis.set(xlabel=xlabel, ylabel=LABELS[measure], ylim=widened(axis.get_ylim()))
            if categories is not None:
                axis.set_xticks(range(len(categories)), categories)
        if len(names) > 1:
            legend(figure, axes[0], len(names))
    return figure


def trade_offs(data: pd.DataFrame, panel: str, series: str, columns: int = 2, extra: float = 1.5) -> Canvas:
    """ASR against ACC: axes per `panel`, a mark per `series`."""
    titles, names = (list(dict.fromkeys(data[key])) for key in (panel, series))
    with tiles(titles, LABELS["asr"], LABELS["acc"], columns=min(columns, len(titles)), extra=extra) as (figure, axes):
        for axis, title in zip(axes, titles, strict=True):
            marks(axis, data[data[panel] == title], series, names, "acc")
        axes[0].set_ylim(widened(axes[0].get_ylim()))   # of all, which share it, once all is drawn
        legend(figure, axes[0], len(names))
    return figure


def _root(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.sqrt(np.abs(values))


ROOTS = (_root, lambda values: np.sign(values) * np.square(values))     # a scale of square roots, and back


def marks(axis: Axes, data: pd.DataFrame, series: str, names: Sequence[str], measure: str) -> None:
    """ASR, on the scale of its square root, against another measure, with intervals; names without a run are only for
    the legend."""
    for i, name in enumerate(names):
        asr, other = (data[(data[series] == name) & (data.measure == each)] for each in ("asr", measure))
        colour, marker = look(name, i)
        # The victim's mark is larger, so that it is seen around those of defenses that changed nothing.
        axis.errorbar(asr["mean"], other["mean"], xerr=errors(asr), yerr=errors(other), fmt=marker, color=colour,
                      elinewidth=0.7, markersize=7 if name == BEFORE else None, label=name)
    # On a straight axis what several defenses leave of a backdoor would be one heap.
    axis.set_xscale("function", functions=ROOTS)
    axis.set(xlim=(-0.3, 110), xticks=(0, 5, 20, 50, 100), xticklabels=("0", "5", "20", "50", "100"))


def limits(axes: Sequence[Axes], measures: Sequence[str]) -> None:
    """ASR from 0 to 100, so that a small remainder looks small; other measures as the data need."""
    for axis, measure in zip(axes, measures, strict=True):
        axis.set_xlim((-3, 103) if measure == "asr" else widened(axis.get_xlim()))


def widened(ends: tuple[float, float]) -> tuple[float, float]:
    """Limits of an axis in percent, at least SPAN points apart, so that nothing looks like a difference that is none.

    What lies within 0 to 100 stays within -0.5 to 100.5.
    """
    low, high = ends
    missing = max(0.0, SPAN - (high - low)) / 2
    if not missing:
        return ends
    low, high = low - missing, high + missing
    shift = max(0.0, -0.5 - low) - max(0.0, high - 100.5)
    return low + shift, high + shift


def legend(figure: Canvas, axis: Axes, columns: int) -> None:
    """One legend below all panels."""
    handles, names = axis.get_legend_handles_labels()
    # Columns are as wide as their longest entry; six characters for marker and gap.
    fitting = max(1, LEGEND_WIDTH // (max(map(len, names), default=1) + 6))
    figure.legend(handles, names, loc="outside lower center", ncols=min(columns, 6, fitting), handletextpad=0.4,
                  columnspacing=1.2)
