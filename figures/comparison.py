"""What the figures of several papers share: the comparison, one factor varied, triggers, attention maps."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from figures.style import BARS, Figure, canvas, done, dots, lines, seed_dots, seeds
from reproduce.results import Results
from reproduce.store import Run
from tables.against_published import published_values
from tables.comparison import AUTHORS_VICTIM, Factor, Study, defense_rows, main_rows, rows, within_a_line
from tables.layout import BEFORE, TOOK, measured, not_taken, present
from tables.render import MISSING

AMPLIFIED = 4       # factor on the trigger's residual in the gallery
PICTURES = 2        # images shown in the attention figure


def if_present(results: Results, paper: str, item: str, build: Callable[[], Figure | None]) -> list[Figure]:
    """The figure, where the protocol entries at hand include the item and a run of it is finished."""
    figure = build() if present(results, paper, item) else None
    return [] if figure is None else [figure]


def comparisons(results: Results, study: Study) -> list[Figure]:
    """ASR and ACC of every attack and defense."""
    built = []
    for (item, variant), (name, title) in study.main.items():
        built += if_present(results, study.paper, item, lambda i=item, v=variant, n=name, t=title: _comparison(
            main_rows(results, study, i, v), n, f"{study.name}: ASR and ACC, {t}"))
    return built


def _comparison(frame: pd.DataFrame, name: str, title: str) -> Figure | None:
    data = done(frame, ["attack", "defense"], ("asr", "acc"))
    if not len(data):
        return None
    weak = not_taken(frame)
    shown = data.assign(attack=data.attack.map(lambda attack: f"{attack} †" if attack in weak else attack))
    flagged = f" † The attack did not take: ASR before below {TOOK:.0f} %." if weak else ""
    return Figure(name, title, f"{BARS} {seeds(data)}.{flagged}",
                  lambda: dots(shown, "attack", "defense", ("asr", "acc")), data, seeds(data))


def authors_victim(results: Results, study: Study) -> list[Figure]:
    """Every seed of every defense on the checkpoint that the authors published, and what they published of it."""
    def build() -> Figure | None:
        measures = ("asr", "acc_nontarget")
        frame = rows(results, study.paper, "authors-victim", "attack", "defense", "variant")
        data = done(frame, ["defense"], measures)
        if not len(data):
            return None
        runs = pd.concat([measured(frame, measure).assign(measure=measure).rename(columns={measure: "value"})
                          for measure in measures])[["defense", "measure", "seed", "value", "run"]]
        theirs = pd.DataFrame([
            {"defense": cell["labels"]["defense"], "measure": measure, "value": value, "source": entry["source"]}
            for entry in published_values(study.paper)["rows"] for cell in entry["compare"]
            if cell["item"] == "authors-victim" for measure, value in entry["values"].items()],
            columns=["defense", "measure", "value", "source"])
        theirs = theirs[theirs.defense.isin(data.defense)]
        sources = "; ".join(dict.fromkeys(theirs.source))
        note = f" Triangles: published ({sources}), of which the spread is not known." if sources else ""
        return Figure("authors-victim", f"{study.name}: the defenses on {AUTHORS_VICTIM}",
                      f"BadNets. Grey: each seed. {BARS} {seeds(data)}.{note}",
                      lambda: seed_dots(data, runs, theirs, "defense", measures),
                      pd.concat([runs.assign(what="run"), theirs.assign(what="published")], ignore_index=True),
                      seeds(data))
    return if_present(results, study.paper, "authors-victim", build)


def clean_fraction(results: Results, study: Study) -> Figure | None:
    """ASR and ACC against the defender's share of clean data."""
    keys = ["fraction", "defense", "settings"]
    data = done(defense_rows(results, study.paper, "clean-fraction", "fraction"), keys, ("asr", "acc"))
    if not len(data):
        return None
    # The settings are named only where one defense appears in several.
    if data.groupby("defense").settings.nunique().max() > 1:
        data["defense"] = data.defense + ", " + data.settings
    shares = sorted(set(data.fraction), key=number)
    return Figure("clean-fraction", f"{study.name}: share of clean data", f"BadNets. {BARS} {seeds(data)}.",
                  lambda: lines(data, "fraction", "defense", ("asr", "acc"), "clean data", shares), data, seeds(data))


def number(text: str) -> float:
    """The number in a label such as "5 %"."""
    return float(text.removesuffix("%"))


def ablation(results: Results, study: Study, factor: Factor) -> list[Figure]:
    """One factor varied."""
    def build() -> Figure | None:
        keys = list(factor.keys)
        data = done(rows(results, study.paper, factor.item, *keys), keys, ("asr", "acc"))
        if not len(data):
            return None
        # With a second label its values are the rows, and the factor's the dots in them.
        line, series = (keys[0], keys[1]) if factor.within else (keys[0], None)
        return Figure(factor.item, f"{study.name}: {factor.name}",
                      f"{factor.on}. {factor.caption} {BARS} {seeds(data)}.",
                      lambda: dots(data, line, series, ("asr", "acc"), within_a_line(factor.keys[line])), data,
                      seeds(data))
    return if_present(results, study.paper, factor.item, build)


@dataclass(frozen=True)
class Shown:
    """One attack's example: clean and triggered uint8 (3, 32, 32)."""

    attack: str
    run: str
    clean: np.ndarray
    triggered: np.ndarray

    @property
    def residual(self) -> np.ndarray:
        """Triggered minus clean in grey levels, (3, 32, 32)."""
        return self.triggered.astype(int) - self.clean


def gallery(results: Results, study: Study, item: str) -> Figure | None:
    """What each attack does to an image."""
    shown = list(_examples(results, study.paper, item))
    if not shown:
        return None
    data = pd.DataFrame([{"attack": e.attack, "run": e.run, "max_abs_residual": int(np.abs(e.residual).max()),
                          "mean_abs_residual": float(np.abs(e.residual).mean()),
                          "changed_pixels": int((e.residual != 0).any(0).sum())} for e in shown])

    def draw() -> Canvas:
        figure = canvas(3.1)
        axes = figure.subplots(3, len(shown), squeeze=False)
        for column, example in enumerate(shown):
            amplified = np.clip(128 + AMPLIFIED * example.residual, 0, 255).astype(np.uint8)
            for axis, picture in zip(axes[:, column], (example.clean, example.triggered, amplified), strict=True):
                axis.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
                bare(axis)
            axes[0, column].set_title(example.attack)
        for axis, label in zip(axes[:, 0], ("clean", "triggered", f"difference × {AMPLIFIED}"), strict=True):
            axis.set_ylabel(label)
        return figure

    note = " CL also changes the training images it poisons; shown is what the test images get." \
        if item == "main" and any(example.attack == "CL" for example in shown) else ""
    title = f"{study.name}: the triggers" + (" of the released code" if item == "main-released" else "")
    return Figure("triggers" + ("-released" if item == "main-released" else ""), title,
                  f"A clean test image, the same with the trigger, and their difference × {AMPLIFIED} around mid-grey."
                  f"{note}", draw, data)


def _examples(results: Results, paper: str, item: str) -> Iterator[Shown]:
    """The first sample of each attack's first finished victim."""
    for attack, runs in _by_attack(results, paper, item).items():
        arrays = runs[0].arrays("samples")
        if len(arrays["triggered"]):
            yield Shown(attack, runs[0].name, arrays["images"][0], arrays["triggered"][0])


def _by_attack(results: Results, paper: str, item: str) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for (attack, _seed), run in results.victims(paper, item).items():
        found.setdefault(attack, []).append(run)
    return found


def attention_maps(results: Results, study: Study, shown: Sequence[str], attack: str = "BadNets") -> Figure | None:
    """Where the network looks on clean and triggered images, before and after each defense of `shown`; nothing without
    a run of the last of them."""
    frame = rows(results, study.paper, "main", "attack", "defense", "variant")
    wanted = frame.defense.isin([BEFORE, *shown])
    frame = frame[(frame.attack == attack) & (frame.status == "done") & wanted]
    found = []
    for variant in study.variants:
        part = frame[frame.variant.isin([variant, MISSING])]
        for seed, runs in part.groupby("seed"):
            if BEFORE in set(runs.defense) and shown[-1] in set(runs.defense):
                found.append((len(runs), variant, seed, runs))
    if not found:
        return None
    # The most complete set of rows; on a tie described before released, then the first seed.
    _count, variant, seed, runs = max(found, key=lambda candidate: candidate[0])
    samples = {row.defense: results.finished(row.run).arrays("samples") for row in runs.itertuples()}
    kinds = ("clean", "triggered")
    first = next(iter(samples.values()))
    layers = [key.removeprefix("attention_clean_") for key in first if key.startswith("attention_clean_")]
    count = min(PICTURES, len(first["images"]))
    maps = {(defense, i, kind, layer): _scaled(arrays[f"attention_{kind}_{layer}"][i])
            for defense, arrays in samples.items() for i in range(count) for kind in kinds for layer in layers}
    data = pd.concat([pd.DataFrame({"defense": key[0], "image": key[1], "kind": key[2], "layer": key[3],
                                    "row": np.repeat(np.arange(len(values)), values.shape[1]),
                                    "column": np.tile(np.arange(values.shape[1]), len(values)),
                                    "attention": values.ravel()}) for key, values in maps.items()])

    def draw() -> Canvas:
        figure = canvas(0.75 + 0.52 * len(samples) + 0.9)
        grid = figure.add_gridspec(1 + len(samples), count * len(kinds) * len(layers),
                                   height_ratios=[1.6, *[1.0] * len(samples)])
        for block, (i, kind) in enumerate((i, kind) for i in range(count) for kind in kinds):
            start = block * len(layers)
            axis = figure.add_subplot(grid[0, start:start + len(layers)])
            picture = first["images" if kind == "clean" else "triggered"][i]
            axis.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
            axis.set_title(f"image {i + 1}, {kind}", fontsize=7.5)
            bare(axis)
            for down, defense in enumerate(samples):
                for across, layer in enumerate(layers):
                    axis = figure.add_subplot(grid[down + 1, start + across])
                    axis.imshow(maps[defense, i, kind, layer], cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
                    bare(axis)
                    if block == across == 0:
                        axis.set_ylabel(textwrap.fill(defense, 16), rotation=0, ha="right", va="center", fontsize=7.5)
                    if down == len(samples) - 1:
                        axis.set_xlabel(str(across + 1), fontsize=7)
        figure.supxlabel("residual group", fontsize=7.5)
        return figure

    return Figure("attention-maps", f"{study.name}: attention on {attack}, before and after",
                  f"Attention sum |F|^2 over channels after residual groups 1 to {len(layers)} ({variant} settings, "
                  f"seed {seed}); each map is divided by its own maximum, so colours compare places, not strengths.",
                  draw, data)


def _scaled(values: np.ndarray) -> np.ndarray:
    """A map (h, w) divided by its largest finite value; float16 overflow counts as the maximum."""
    values = values.astype(np.float32)
    top = values[np.isfinite(values)].max(initial=0.0)
    return np.clip(np.nan_to_num(values, posinf=top) / (top or 1.0), 0, 1)


def bare(axis: Axes) -> None:
    """Picture only: no ticks, grid or frame."""
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)
