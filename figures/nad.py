"""NAD's figures, from the runs of `reproduce.protocols.nad`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from figures.style import BARS, Figure, canvas, done, dots, lines, seeds
from reproduce.results import Results
from reproduce.store import Run
from tables.layout import BEFORE, TOOK, not_taken, present
from tables.nad import ABLATIONS, CONTROL, PAPER, VARIANTS, history, main_rows, published_values, rows
from tables.render import MISSING

AMPLIFIED = 4       # factor on the trigger's residual in the gallery
PICTURES = 2        # images shown in the attention figure
BLOCKS = ("block1", "block2", "block3")


def figures(results: Results, smoke: bool = False) -> list[Figure]:
    """Every figure whose runs are at hand. At smoke scale nothing published is drawn in."""
    built: list[Figure | None] = []
    for variant in VARIANTS:
        built += _if_present(results, "main", lambda item, v=variant: comparison(results, item, v))
    built += _if_present(results, "main-released", lambda item: comparison(results, item, "released"))
    built += _if_present(results, "clean-fraction", lambda item: clean_fraction(results))
    built += _if_present(results, "beta", lambda item: beta(results))
    built += _if_present(results, "curves", lambda item: training_curves(results, smoke))
    for item in ABLATIONS:
        if item != "beta":
            built += _if_present(results, item, lambda item: ablation(results, item))
    built += _if_present(results, "augmentation", lambda item: augmentation(results))
    for item in ("main", "main-released"):
        built += _if_present(results, item, lambda item: gallery(results, item))
    built += _if_present(results, "main", lambda item: attention_maps(results))
    return [replace(figure, name=f"{PAPER}-{figure.name}") for figure in built if figure is not None]


def _if_present(results: Results, item: str, build: Callable[[str], Figure | None]) -> list[Figure | None]:
    return [build(item)] if present(results, PAPER, item) else []


NAMES = {("main", "described"): ("main", "ASR and ACC, attacks and defenses as described"),
         ("main", "released"): ("main-released-defenses", "ASR and ACC, defenses with released settings"),
         ("main-released", "released"): ("main-released", "ASR and ACC, attacks and defenses as in the released code")}


def comparison(results: Results, item: str, variant: str) -> Figure | None:
    """ASR and ACC of every attack and defense."""
    data = done(main_rows(results, item, variant), ["attack", "defense"], ("asr", "acc"))
    if not len(data):
        return None
    name, title = NAMES[item, variant]
    weak = not_taken(main_rows(results, item, variant))
    shown = data.assign(attack=data.attack.map(lambda attack: f"{attack} †" if attack in weak else attack))
    flagged = f" † The attack did not take: ASR before below {TOOK:.0f} %." if weak else ""
    return Figure(name, f"NAD: {title}", f"{BARS} {seeds(data)}.{flagged}",
                  lambda: dots(shown, "attack", "defense", ("asr", "acc")), data, seeds(data))


def clean_fraction(results: Results) -> Figure | None:
    """ASR and ACC against the defender's share of clean data."""
    data = done(rows(results, "clean-fraction", "fraction", "defense", "variant"), ["fraction", "defense", "variant"],
                ("asr", "acc"))
    if not len(data):
        return None
    # The settings are named only where one defense appears in several.
    if data.groupby("defense").variant.nunique().max() > 1:
        data["defense"] = data.defense + ", " + data.variant
    shares = sorted(set(data.fraction), key=_number)
    return Figure("clean-fraction", "NAD: share of clean data", f"BadNets. {BARS} {seeds(data)}.",
                  lambda: lines(data, "fraction", "defense", ("asr", "acc"), "clean data", shares), data, seeds(data))


def beta(results: Results) -> Figure | None:
    """ASR and ACC against the weight of the distillation terms."""
    data = done(rows(results, "beta", "beta"), ["beta"], ("asr", "acc")).assign(series="NAD")
    if not len(data):
        return None
    factors = sorted(set(data.beta), key=_number)
    data = data.assign(order=data.beta.map(factors.index)).sort_values(["measure", "order"]).drop(columns="order")
    return Figure("beta", "NAD: weight of the distillation terms", "BadNets; factor on the released betas, not to "
                  f"scale; 0 is fine-tuning on the same schedule. {BARS} {seeds(data)}.",
                  lambda: lines(data, "beta", "series", ("asr", "acc"), "factor on beta", factors), data, seeds(data))


def _number(text: str) -> float:
    return float(text.removesuffix("%"))


def training_curves(results: Results, smoke: bool) -> Figure | None:
    """Accuracy and ASR after each epoch of the defense, with the log published beside the code."""
    frame = history(results)
    if not len(frame):
        return None
    data = done(frame, ["epoch", "defense"], ("asr", "acc_nontarget"))
    log = pd.DataFrame() if smoke else pd.DataFrame(published_values()["log"]["rows"],
                                                    columns=published_values()["log"]["columns"])

    def draw() -> Canvas:
        figure = lines(data, "epoch", "defense", ("asr", "acc_nontarget"), "epoch", band=True)
        for axis, measure in zip(figure.axes, ("asr", "acc_nontarget"), strict=True):
            if len(log):
                # An underscore keeps the log out of the legend, which is drawn already: the caption names it.
                axis.plot(log.epoch, log[measure], color="0.2", linestyle=":", linewidth=1, label="_published")
            axis.xaxis.get_major_locator().set_params(integer=True)
        return figure

    note = f" Dotted: {published_values()['log']['source']}, one run." if len(log) else ""
    return Figure("curves", "NAD: epoch by epoch", "BadNets, released settings; epoch 0 is the victim. Lines: means "
                  f"over seeds. {BARS.replace('Bars', 'Bands')} {seeds(data)}.{note}", draw, data, seeds(data))


def ablation(results: Results, item: str) -> Figure | None:
    """One choice of NAD varied, on BadNets."""
    label = {"variants": "variant"}.get(item, item)
    title, caption = ABLATIONS[item]
    data = done(rows(results, item, label), [label], ("asr", "acc"))
    if not len(data):
        return None
    return Figure(item, f"NAD: {title.lower()}", f"BadNets. {caption} {BARS} {seeds(data)}.",
                  lambda: dots(data, label, None, ("asr", "acc")), data, seeds(data))


def augmentation(results: Results) -> Figure | None:
    """Victims trained with and without augmentation."""
    data = done(rows(results, "augmentation", "victim", "defense"), ["victim", "defense"], ("asr", "acc"))
    if not len(data):
        return None
    return Figure("augmentation", "NAD: augmentation in the victim's training", f"BadNets. {BARS} {seeds(data)}.",
                  lambda: dots(data, "victim", "defense", ("asr", "acc")), data, seeds(data))


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


def gallery(results: Results, item: str) -> Figure | None:
    """What each attack does to an image."""
    shown = list(_examples(results, item))
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
                _bare(axis)
            axes[0, column].set_title(example.attack)
        for axis, label in zip(axes[:, 0], ("clean", "triggered", f"difference × {AMPLIFIED}"), strict=True):
            axis.set_ylabel(label)
        return figure

    note = " CL also changes the training images it poisons; shown is what the test images get." \
        if any(example.attack == "CL" for example in shown) else ""
    title = "NAD: the triggers" + (" of the released code" if item == "main-released" else "")
    return Figure("triggers" + ("-released" if item == "main-released" else ""), title,
                  f"A clean test image, the same with the trigger, and their difference × {AMPLIFIED} around mid-grey."
                  f"{note}", draw, data)


def _examples(results: Results, item: str) -> Iterator[Shown]:
    """The first sample of each attack's first finished victim."""
    for attack, runs in _by_attack(results, item).items():
        arrays = runs[0].arrays("samples")
        if len(arrays["triggered"]):
            yield Shown(attack, runs[0].name, arrays["images"][0], arrays["triggered"][0])


def _by_attack(results: Results, item: str) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for (attack, _seed), run in results.victims(PAPER, item).items():
        found.setdefault(attack, []).append(run)
    return found


def attention_maps(results: Results, attack: str = "BadNets") -> Figure | None:
    """Where the network looks on clean and triggered images, before and after each defense."""
    frame = rows(results, "main", "attack", "defense", "variant")
    wanted = frame.defense.isin([BEFORE, "FT", CONTROL, "NAD"])
    frame = frame[(frame.attack == attack) & (frame.status == "done") & wanted]
    found = []
    for variant in VARIANTS:
        part = frame[frame.variant.isin([variant, MISSING])]
        for seed, runs in part.groupby("seed"):
            if BEFORE in set(runs.defense) and "NAD" in set(runs.defense):
                found.append((len(runs), variant, seed, runs))
    if not found:
        return None
    # The most complete set of rows; on a tie described before released, then the first seed.
    _count, variant, seed, runs = max(found, key=lambda candidate: candidate[0])
    samples = {row.defense: results.named(row.run).arrays("samples") for row in runs.itertuples()}
    kinds = ("clean", "triggered")
    first = next(iter(samples.values()))
    layers = [layer for layer in BLOCKS if f"attention_clean_{layer}" in first]
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
            _bare(axis)
            for down, defense in enumerate(samples):
                for across, layer in enumerate(layers):
                    axis = figure.add_subplot(grid[down + 1, start + across])
                    axis.imshow(maps[defense, i, kind, layer], cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
                    _bare(axis)
                    if block == across == 0:
                        axis.set_ylabel(defense.replace(" (", "\n("), rotation=0, ha="right", va="center", fontsize=7.5)
                    if down == len(samples) - 1:
                        axis.set_xlabel(str(across + 1), fontsize=7)
        figure.supxlabel("residual group", fontsize=7.5)
        return figure

    return Figure("attention-maps", f"NAD: attention on {attack}, before and after",
                  f"Attention sum |F|^2 over channels after residual groups 1 to {len(layers)} ({variant} settings, "
                  f"seed {seed}); each map is divided by its own maximum, so colours compare places, not strengths.",
                  draw, data)


def _scaled(values: np.ndarray) -> np.ndarray:
    """A map (h, w) divided by its largest finite value; float16 overflow counts as the maximum."""
    values = values.astype(np.float32)
    top = values[np.isfinite(values)].max(initial=0.0)
    return np.clip(np.nan_to_num(values, posinf=top) / (top or 1.0), 0, 1)


def _bare(axis) -> None:
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)
