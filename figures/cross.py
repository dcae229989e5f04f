"""All defenses on all attacks: critical-difference diagrams, ASR against the base rate, and against ACC."""

from dataclasses import replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from figures.comparison import if_present
from figures.style import (
    BARS,
    LABELS,
    ROOTS,
    Figure,
    done,
    legend,
    look,
    marks,
    panels,
    seeds,
    tiles,
    trade_offs,
)
from reproduce.results import Results
from reproduce.statistics import ALPHA, Ranking
from tables.cross import PAPER, equals, main_rows, ranked

RANKED = ("asr", "acc")


def figures(results: Results, smoke: bool = False) -> list[Figure]:
    """Every figure whose runs are at hand."""
    built = if_present(results, PAPER, "main", lambda: critical_difference(results))
    built += if_present(results, PAPER, "main", lambda: base_rates(results))
    built += if_present(results, PAPER, "main", lambda: trade_off(results))
    return [replace(figure, name=f"{PAPER}-{figure.name}") for figure in built]


def critical_difference(results: Results) -> Figure | None:
    """Mean ranks on a line; a bar joins defenses that do not differ significantly."""
    found = {measure: one for measure in RANKED if (one := ranked(results, measure)) is not None}
    if not found:
        return None
    data = pd.DataFrame([{"measure": measure, "defense": name, "mean_rank": rank, "pairs": result.blocks,
                          "friedman_p": result.p, "cliques": "; ".join(
                              " ".join(names[i] for i in clique) for clique in result.cliques())}
                         for measure, (names, result, _runs) in found.items()
                         for name, rank in zip(names, result.ranks, strict=True)])
    most = max(len(names) for names, _result, _runs in found.values())

    def draw() -> Canvas:
        with panels(0.9 + 0.17 * most, list(found)) as (figure, axes):
            for axis, (measure, (names, result, _runs)) in zip(axes, found.items(), strict=True):
                _diagram(axis, names, result)
                axis.set_title(f"{LABELS[measure].removesuffix(' (%)')}, {result.blocks} pairs\n"
                               f"Friedman p {equals(result.p)}")
        return figure

    bars = "defenses joined by a bar do not differ significantly (exact Wilcoxon signed-rank tests, Holm over all " \
        "pairs, 5 %)."
    if any(result.least >= ALPHA for _names, result, _runs in found.values()):
        bars = "no bars, for so few pairs can tell no two of so many defenses apart."
    return Figure("critical-difference", "Every defense on every attack: critical differences",
                  f"Mean rank over (attack, seed) pairs, 1 is best; {bars}", draw, data)


def _diagram(axis: Axes, names: list[str], result: Ranking) -> None:
    """Defenses from best to worst, one line each, with their mean rank; bars to the right of them."""
    order = sorted(range(len(names)), key=lambda i: result.ranks[i])
    for line, i in enumerate(order):
        colour, marker = look(names[i], i)
        axis.plot(result.ranks[i], line, marker=marker, color=colour)
    cliques = result.cliques() if result.least < ALPHA else []
    for number, clique in enumerate(cliques):
        lines = [order.index(i) for i in clique]
        axis.plot([len(names) + 0.3 + 0.25 * number] * 2, [min(lines) - 0.2, max(lines) + 0.2], color="0.2",
                  linewidth=2, solid_capstyle="butt")
    axis.set_yticks(range(len(order)), [names[i] for i in order])
    axis.set(ylim=(len(order) - 0.5, -0.5), xlabel="mean rank",
             xlim=(0.7, len(names) + 0.5 + 0.25 * len(cliques)))
    axis.grid(axis="y", visible=False)


def base_rates(results: Results) -> Figure | None:
    """What each defense leaves of ASR, against what the same images get without the trigger, a panel per attack."""
    data = done(main_rows(results), ["attack", "defense"], ("asr", "base_rate"))
    if not len(data):
        return None
    attacks, defenses = (list(dict.fromkeys(data[key])) for key in ("attack", "defense"))

    def draw() -> Canvas:
        with tiles(attacks, LABELS["asr"], LABELS["base_rate"], columns=min(3, len(attacks)), extra=1.5) as (
                figure, axes):
            for axis, attack in zip(axes, attacks, strict=True):
                axis.plot([0, 110], [0, 110], color="0.6", linewidth=0.8, linestyle="--", zorder=1)
                marks(axis, data[data.attack == attack], "defense", defenses, "base_rate")
                axis.set_yscale("function", functions=ROOTS)
                axis.set(ylim=(-0.05, 1.2 * data[data.measure == "base_rate"]["mean"].max() + 1),
                         yticks=(0, 1, 5, 20), yticklabels=("0", "1", "5", "20"))
            legend(figure, axes[0], len(defenses))
        return figure

    return Figure("base-rate", "Every defense on every attack: ASR against the base rate",
                  "Base rate: the share of the same test images that the same model calls the target without the "
                  "trigger. On the dashed line the trigger makes no difference; excess ASR is the way from there to "
                  f"the right. A lower base rate is no repair. Both on square-root scales. {BARS} {seeds(data)}.",
                  draw, data, seeds(data))


def trade_off(results: Results) -> Figure | None:
    """Mean ASR against mean ACC of each defense, a panel per attack."""
    frame = main_rows(results)
    data = done(frame, ["attack", "defense"], ("asr", "acc"))
    if not len(data):
        return None
    return Figure("trade-off", "Every defense on every attack: ASR against ACC",
                  f"Best is top left; ASR on a square-root scale. {BARS} {seeds(data)}.",
                  lambda: trade_offs(data, "attack", "defense", columns=3), data, seeds(data))

