"""Figures: they exist, say what they show, and are the same bytes for the same runs."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from figures import nad
from figures.comparison import AMPLIFIED, Shown, _scaled
from figures.style import WIDTH, Figure, done, errors, widened
from reproduce.results import Results
from reproduce.store import Store
from tests.synthetic import results


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figure]:
    return {figure.name: figure for figure in nad.figures(results(tmp_path_factory.mktemp("runs"), seeds=2))}


def test_every_item_has_its_figure(figures: dict[str, Figure]) -> None:
    assert set(figures) == {f"nad-{name}" for name in (
        "main", "main-released-defenses", "main-released", "clean-fraction", "beta", "curves", "attention",
        "distillation", "teacher", "variants", "augmentation", "triggers", "triggers-released", "attention-maps")}
    assert all(figure.caption for figure in figures.values())
    assert nad.figures(Results(Store(Path("nowhere")), [])) == []


@pytest.mark.slow
def test_figures_are_drawn_the_same_twice(figures: dict[str, Figure], tmp_path: Path) -> None:
    for figure in figures.values():
        figure.write(tmp_path / "first")
    for name in ("nad-main", "nad-attention-maps"):
        figures[name].write(tmp_path / "second")
        for ending in ("pdf", "png", "csv"):
            assert (tmp_path / "first" / f"{name}.{ending}").read_bytes() == \
                (tmp_path / "second" / f"{name}.{ending}").read_bytes()
    for name in figures:
        with Image.open(tmp_path / "first" / f"{name}.png") as picture:
            assert picture.width == WIDTH * 200
            pixels = np.asarray(picture.convert("L"))
        # Ink at the outermost pixels would be a label cut off.
        assert (pixels[:, :2] == 255).all() and (pixels[:, -2:] == 255).all(), name
        assert len(pd.read_csv(tmp_path / "first" / f"{name}.csv"))


def test_smoke_scale_is_written_on_the_figure(figures: dict[str, Figure], tmp_path: Path) -> None:
    figures["nad-beta"].write(tmp_path / "plain")
    figures["nad-beta"].write(tmp_path / "smoke", smoke=True)
    assert (tmp_path / "smoke/nad-beta.png").read_bytes() != (tmp_path / "plain/nad-beta.png").read_bytes()
    text = (tmp_path / "smoke/nad-beta.csv").read_text()
    assert text.startswith("# smoke scale\n")
    assert len(pd.read_csv(io.StringIO(text), comment="#")) == 12


def test_two_seeds_are_drawn_as_their_range(figures: dict[str, Figure], tmp_path: Path) -> None:
    frame = pd.DataFrame({"defense": "NAD", "seed": [0, 1], "run": ["a", "b"], "status": "done", "asr": [4.0, 6.0],
                          "n_nontarget": 100})
    data = done(frame, ["defense"], ["asr"])
    assert (data.low[0], data.high[0], data.interval[0]) == (pytest.approx(4.0), pytest.approx(6.0), "range")
    assert [part[0] for part in errors(data)] == pytest.approx([1.0, 1.0])
    assert set(figures["nad-main"].data.interval) == {"range", "Wilson"}


def test_beta_is_in_numeric_order(figures: dict[str, Figure]) -> None:
    data = figures["nad-beta"].data
    assert list(data[data.measure == "asr"].beta) == ["0", "0.1", "0.3", "1", "3", "10"]


def test_residual_is_signed() -> None:
    example = Shown("SIG", "run", np.full((3, 2, 2), 200, np.uint8), np.full((3, 2, 2), 190, np.uint8))
    assert (example.residual == -10).all() and AMPLIFIED > 1


def test_overflowed_attention_counts_as_the_maximum() -> None:
    scaled = _scaled(np.array([[1, 2], [np.inf, 0]], np.float16))
    assert scaled.tolist() == [[0.5, 1.0], [1.0, 0.0]]
    assert _scaled(np.zeros((2, 2), np.float16)).max() == 0


@pytest.mark.parametrize(("ends", "shown"), [
    ((99.0, 100.0), (90.5, 100.5)),     # rounding at the upper end does not fill the axis
    ((0.0, 1.0), (-0.5, 9.5)),
    ((40.0, 42.0), (36.0, 46.0)),
    ((-5.0, 105.0), (-5.0, 105.0)),
])
def test_an_axis_in_percent_shows_at_least_ten_points(ends: tuple[float, float], shown: tuple[float, float]) -> None:
    assert widened(ends) == pytest.approx(shown)
