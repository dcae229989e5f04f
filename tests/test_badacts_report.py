"""BadActs' tables, figures and claims, from its whole protocol with made-up runs of sentences."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from figures import badacts as figures
from figures.badacts import roc_points
from reproduce import claims
from reproduce.cells import Task, Victim
from reproduce.claims import criteria
from reproduce.cli import Selection
from reproduce.metrics import Detection, Predictions, auroc, detection_metrics, metrics, wilson
from reproduce.protocols import BEFORE, NEVER, PROFILES, Entry, Profile, departure, entries
from reproduce.protocols.badacts import METHOD, PAPER, REJECT, STATISTICS, THEN, detection, purification
from reproduce.results import Results
from reproduce.statistics import mcnemar
from reproduce.store import Store
from tables import badacts as tables
from tables import render
from tables.layout import estimate, hanley_mcneil
from tables.render import Table
from tests.drawn import shows

TARGET, COUNT, LAYERS, UNITS, SHOWN = 1, 400, 2, 24, 4
QUICK = PROFILES["quick"]
WHOLE = replace(QUICK, smoke=False)     # every attack at each of its two seeds
MAIN = [purification("sentences"), detection("sentences")]
# (ACC, ASR) in percent of the made-up runs, and the suspicion that a trigger adds (0: nothing is detected).
LEVELS = {"Before": (90, 98), METHOD: (85, 12), THEN: (89, 14), REJECT: (86, 5), STATISTICS: (88, 60), "FT": (89, 70),
          "ONION": (80, 40), "BadActs, dealt anew": (70, 50)}
OTHERS = (84, 30)
TRIGGER = {"unchanged": 1.5, "degenerate": 20.0, "clean_degenerate": 2.0, "words_kept": 70.0, "length": 110.0}
CLEANED = {"clusters": 3, "training_sentences": 200, "poisoned": 40, "dropped": 46, "dropped_poisoned": 30}


def predictions(acc: float, asr: float, rng: np.random.Generator) -> Predictions:
    """Two classes, half of the test sentences each; exactly these shares but for rounding, at random places."""
    labels = np.arange(COUNT) % 2
    clean = np.where(rng.permutation(COUNT) < acc / 100 * COUNT, labels, 1 - labels)
    index = np.flatnonzero(labels != TARGET)
    triggered = np.where(rng.permutation(len(index)) < asr / 100 * len(index), TARGET, 1 - TARGET)
    arrays = (labels, clean, index, np.full(len(index), TARGET), triggered)
    return Predictions(*(array.astype(np.int32) for array in arrays))


def suspicions(shift: float, rng: np.random.Generator) -> Detection:
    """Suspicion of clean sentences around 0.1, of triggered ones `shift` higher; flagged above 0.15."""
    clean, triggered, held = (np.clip(rng.normal(mean, 0.03, size), 0, 1).astype(np.float32) for mean, size in (
        (0.1, COUNT), (0.1 + shift, COUNT // 2), (0.1, COUNT // 4)))
    return Detection(clean, triggered, clean > 0.15, triggered > 0.15, rng.integers(0, 2, COUNT),
                     np.full(COUNT // 2, TARGET), held)


def write_run(store: Store, task: Task, acc: float, asr: float, seed: int, shift: float | None) -> None:
    """A finished run of sentences; with a shift, one of a detector."""
    rng = np.random.default_rng(seed)
    predicted = predictions(acc, asr, rng)
    states = {f"cls_{kind}{when}": rng.normal(0, 0.5 if when else 1, (SHOWN, LAYERS, UNITS)).astype(np.float16)
              for kind in ("clean", "triggered") for when in ("", "_after")}
    samples = {"texts": np.array(["a film"] * SHOWN), "triggered": np.array(["a cf film"] * SHOWN), **states}
    arrays = {"predictions": vars(predicted), "samples": samples}
    measured, info, tensors = dict(metrics(predicted)), {}, {}
    if isinstance(task, Victim):
        info = {"trigger": TRIGGER}
    else:
        centre, width = torch.zeros(LAYERS, UNITS), 1 + torch.rand(LAYERS, UNITS, generator=torch.manual_seed(seed))
        tensors = {"defense": {"lower": centre - width / 2, "upper": centre + width / 2}}
        info = {"width": 1.5, "kept": 98.5, "restarts": 1, "judging_seconds": 3.0}
        if task.defense == "cube":
            info = {"judging_seconds": 3.0, **CLEANED}
    if shift is not None:
        found = suspicions(shift, rng)
        arrays["scores"] = vars(found)
        measured |= detection_metrics(found, TARGET)
        info["threshold"] = 0.15
    store.write(task.name, config=task.describe(),
                environment={"python": "3.11", "torch": "2.x", "cpu": "a test", "device": "cpu", "threads": 1,
                             "commit": "0" * 12, "source": "f" * 16, "finished": "2026-01-01T00:00:00Z"},
                metrics={**measured, "seconds": 1.0 + task.seed, "info": info}, history=[], arrays=arrays,
                tensors=tensors)


def made(root: Path, profile: Profile, levels: dict[str, tuple[float, float]] | None = None, shift: float = 0.1,
         items: list[str] | None = None) -> Results:
    """All runs of the protocol, or those of some items, at levels that depend on the defense alone."""
    store, found = Store(root), entries(profile, [PAPER], items)
    for number, entry in enumerate(found):
        if store.find(entry.task.name):
            continue
        detects = entry.item.startswith(("detection-", "never-poisoned-")) or entry.item in ("deviations", "frr") or \
            entry.labels.get("defense") in (THEN, REJECT)
        acc, asr = (LEVELS | (levels or {})).get(entry.labels.get("defense", ""), OTHERS)
        write_run(store, entry.task, acc, asr, number,
                  shift if detects and not isinstance(entry.task, Victim) else None)
    return Results(store, found)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return made(tmp_path_factory.mktemp("badacts"), QUICK)


@pytest.fixture(scope="module")
def built(results: Results) -> dict[str, Table]:
    return {table.name.removeprefix("badacts-"): table for table in tables.tables(results)}


PURIFIED = "purification-sentences"
TABLES = {"main", "main-excess", "main-acc", "detection-sentences", "never-poisoned-sentences",
          "deviations", "frr", "weight", "layers",
          "validation", "poison-rate", "triggers", "cost", *(f"{PURIFIED}-{name}" for name in (
              "detection-first", "intervals", "cleaning", "complete", "averages", "significance", "significance-2",
              "by-attack", "by-attack-2"))}
FIGURES = {"main", "trade-off", "suspicion", "roc", "interval-widths", "activations", "deviations", "frr", "weight",
           "layers", "validation", "poison-rate"}
NOTHING = Results(Store(Path("nowhere")), [])


def test_every_item_has_its_table(built: dict[str, Table]) -> None:
    assert set(built) == TABLES
    for table in built.values():
        for text in (render.markdown(table, QUICK), render.html(table, QUICK)):
            assert not re.search(r"\bnan\b", text, re.IGNORECASE), table.name
            assert "image" not in text, table.name
    assert tables.tables(NOTHING) == []


def test_what_was_never_poisoned_stands_below_the_victims(built: dict[str, Table]) -> None:
    for name in ("main", "main-excess", "main-acc"):
        assert list(built[name].frame.Defense)[:3] == [BEFORE, NEVER, "FT"]
        assert NEVER in built[name].caption
        mine = built[name].data[built[name].data.defense == NEVER]
        assert len(mine) == 4 and (mine.n == 1).all() and (mine["mark"] == "").all()
    assert not any(NEVER in set(table.data.get("defense", ())) for name, table in built.items()
                   if not name.startswith("main"))


def test_detectors_meet_the_triggers_where_there_is_no_backdoor(built: dict[str, Table], results: Results) -> None:
    table = built["never-poisoned-sentences"]
    assert set(table.data.defense) == {"ONION", "STRIP", "RAP", "DAN", METHOD}
    line = table.data[(table.data.attack == "AddSent") & (table.data.defense == METHOD)].iloc[0]
    runs = [results.finished(name).json("metrics")["auroc"] for name in line.runs.split()]
    assert line.never_mean == runs[-1] and line.victim_mean == pytest.approx(np.mean(runs[:-1]))
    assert line.difference == pytest.approx(runs[0] - runs[-1]) and line.n == 1
    alone = [entry for entry in results.entries if entry.item == "never-poisoned-sentences"]
    (table,) = tables.tables(Results(results.store, alone))
    assert set(table.frame.Difference.map(str)) == {"-"} and (table.data.never_n == 1).all()


def test_cleaning_says_how_much_it_drops_of_the_poisoned_and_of_the_clean(built: dict[str, Table]) -> None:
    table = built[f"{PURIFIED}-cleaning"]
    assert set(table.data.defense) == {"CUBE"}
    means = table.data.groupby("measure")["mean"].unique().map(list)
    assert means["of_poisoned"] == [75.0] and means["of_clean"] == [10.0] and means["clusters"] == [3.0]


def test_every_item_has_its_figure(results: Results) -> None:
    drawn = figures.figures(results, smoke=True)
    assert {figure.name for figure in drawn} == {f"badacts-{name}" for name in FIGURES}
    for figure in drawn:
        assert shows(figure), figure.name
        assert "image" not in figure.caption
    assert figures.figures(NOTHING) == []


def test_without_a_finished_run_nothing_is_made_up(results: Results, tmp_path: Path) -> None:
    empty = Results(Store(tmp_path), results.entries)
    assert figures.figures(empty) == []
    for table in tables.tables(empty):
        text = render.markdown(table, QUICK)
        assert not re.search(r"\bnan\b", text, re.IGNORECASE), table.name
        assert not table.runs
    assert {claim.outcome for claim in claims.claims(empty, PROFILES["paper"])} == {criteria.NOT_RUN}


def test_a_table_names_the_data_set_and_the_encoder_of_its_runs(built: dict[str, Table]) -> None:
    for table in built.values():
        assert (table.datasets, table.models) == (("sentences",), ("tiny-bert",)), table.name
    assert "dataset sentences, model tiny-bert;" in render.provenance(built["main"], PROFILES["paper"])
    several = Table("t", "", "", built["main"].frame, built["main"].data, (0,), ("run",), "", ("sst-2", "yelp"))
    assert "datasets sst-2, yelp, model wrn-16-1;" in render.provenance(several, PROFILES["paper"])


def test_the_frr_wanted_and_the_frr_measured_are_two_columns(results: Results) -> None:
    frame = results.frame(PAPER, "frr")
    assert list(frame.frr_set) == ["1 %", "5 %"]
    assert frame.frr.between(0, 20).all()


def test_detection_measures_come_from_the_scores(results: Results, built: dict[str, Table]) -> None:
    data = built["detection-sentences"].data
    row = data[(data.attack == "BadNets") & (data.defense == "DAN") & (data.measure == "auroc")].iloc[0]
    found = [results.finished(name).detection() for name in row.runs.split()]
    assert row["mean"] == pytest.approx(np.mean([auroc(one.clean, one.triggered) for one in found]))
    assert "Before" not in set(data.defense)
    for measure, pick in (("auroc", max), ("far", min), ("frr", min)):
        part = data[(data.attack == "BadNets") & (data.measure == measure)]
        assert part["mean"][part["mark"] == "best"].tolist() == [pick(part["mean"])]


def test_an_auroc_of_one_seed_has_an_interval_but_no_mark(results: Results) -> None:
    one = Results(results.store, [entry for entry in results.entries if entry.task.seed == 0])
    data = next(t for t in tables.tables(one) if t.name == "badacts-detection-sentences").data
    areas = data[data.measure.isin(["auroc", "auroc_target"])]
    assert set(data["mark"]) == {""}
    row = areas[areas.measure == "auroc"].iloc[0]
    assert (row.low, row.high) == hanley_mcneil(row["mean"], COUNT // 2, COUNT)
    assert data.interval[data.measure == "frr"].iloc[0] == "Wilson"
    frame = one.frame(PAPER, detection("sentences")).query("defense == 'DAN'")[:1]
    assert estimate(frame, "far").low == wilson(round(frame.far.iloc[0] / 100 * COUNT / 2), COUNT // 2)[0]


def test_hanley_and_mcneils_interval() -> None:
    # By hand: A 0.8, 50 and 100: Q1 = 2/3, Q2 = 0.711; variance (0.16 + 49 * 0.02667 + 99 * 0.07111) / 5000.
    half = 195.996 * ((0.16 + 49 * (0.8 / 1.2 - 0.64) + 99 * (1.28 / 1.8 - 0.64)) / 5000) ** 0.5
    assert hanley_mcneil(80.0, 50, 100) == (pytest.approx(80 - half, abs=1e-3), pytest.approx(80 + half, abs=1e-3))
    assert hanley_mcneil(100.0, 50, 100) == (100.0, 100.0)


def test_detection_first_is_paired_with_purifying_everything(results: Results) -> None:
    one = Results(results.store, [entry for entry in results.entries if entry.task.seed == 1])
    table = tables.detection_first(one, "sentences")
    row = table.data.set_index(["attack", "defense", "measure"]).loc[("AddSent", THEN, "acc")]
    frame = one.frame(PAPER, purification("sentences")).query("attack == 'AddSent' and variant == 'released'")
    runs = {line.defense: one.finished(line.run).hits()["acc"] for line in frame.itertuples()}
    assert row.difference == pytest.approx(89 - 85) and row["from"] < 4 < row.to
    assert row.p == mcnemar(runs[THEN], runs[METHOD]).p <= row.p_holm
    shown = table.frame.set_index([("", "Attack"), ("", "Defense")])
    assert list(shown.index[:4]) == [("BadNets", name) for name in ("Before", METHOD, THEN, REJECT)]
    assert str(shown.loc[("BadNets", METHOD), ("ACC", "Difference")]) == "-"
    assert str(shown.loc[("BadNets", "Before"), ("FRR", "Value")]) == "-"


def test_intervals_and_triggers_report_what_the_runs_say(built: dict[str, Table]) -> None:
    data = built[f"{PURIFIED}-intervals"].data
    assert set(data["mean"][data.measure == "width"]) == {1.5}
    assert len(data[(data.defense == STATISTICS) & (data.measure == "width")]) == 4, "one row for both variants"
    quality = built["triggers"].data
    assert set(quality["mean"][quality.measure == "degenerate"]) == {TRIGGER["degenerate"]}
    assert set(quality["mean"][quality.measure == "asr"]) == {98.0}
    seconds = built["cost"].data
    # 3 seconds for 400 clean and 200 triggered sentences.
    assert set(seconds["mean"][(seconds.measure == "judging") & (seconds.n > 0)]) == {5.0}


def test_a_validation_split_that_is_the_test_split_stands_beside_the_other(results: Results, tmp_path: Path) -> None:
    """The same runs under two data sets' names, one of them made anew with 5 points more ACC."""
    better = made(tmp_path, QUICK, {METHOD: (90, 12)})
    kept = (METHOD, "Before")
    items = {purification: purification("sentences"), detection: detection("sentences")}
    both: list[Entry] = []
    for name, source in (("hsol", results), ("hsol-released", better)):
        for renamed, item in items.items():
            for entry in source.entries:
                if entry.item != item or entry.labels["defense"] not in kept or entry.labels["variant"] == "described":
                    continue
                task = Renamed(entry.task, f"{name}-{entry.task.name}")
                both.append(Entry(PAPER, renamed(name), entry.labels, task))
                path = results.store.root / "runs" / task.name
                if not path.exists():
                    path.symlink_to(source.store.root / "runs" / entry.task.name)
    table = next(t for t in tables.tables(Results(results.store, both))
                 if t.name == "badacts-hsol-released-validation")
    data = table.data.set_index(["attack", "task", "defense", "measure"])
    row = data.loc[("BadNets", "purification", METHOD, "acc")]
    assert (row.own, row.released, row.difference, row.n) == (85, 90, 5, 2)
    assert ("BadNets", "detection", METHOD, "auroc") in data.index
    shown = table.frame.set_index(["Attack", "Task", "Defense", "Measure"])
    assert str(shown.loc[("BadNets", "purification", METHOD, "ACC"), "Difference"]) == "+5.00"
    assert str(shown.loc[("BadNets", "purification", "Before", "ASR"), "Difference"]) == "+0.00", "the same victims"


def test_detection_alone_has_its_tables_and_figures(results: Results) -> None:
    only = Results(results.store, [entry for entry in results.entries if entry.item.startswith("detection-")])
    assert [table.name for table in tables.tables(only)] == [
        f"badacts-{name}" for name in ("detection-sentences", "triggers", "cost")]
    assert [figure.name for figure in figures.figures(only)] == ["badacts-suspicion", "badacts-roc"]
    assert outcomes(only)["detects-feature-triggers"] != criteria.NOT_RUN
    assert outcomes(only)["erases-word-triggers"] == criteria.NOT_RUN


def test_onion_with_gpt2_stands_beside_the_stand_in(tmp_path: Path) -> None:
    profile = replace(PROFILES["paper"], seeds=(0,))
    found = made(tmp_path, profile, items=["onion-gpt2", purification("sst-2"), purification("yelp")])
    table = next(t for t in tables.tables(found) if t.name == "badacts-onion-gpt2")
    assert table.datasets == ("sst-2",) and table.models == ("bert-base-uncased",)
    assert list(table.data[table.data.attack == "BadNets"].defense.unique()) == ["Before", "ONION, GPT-2", "ONION"]


class Renamed(Task):
    """A task's run under another name."""

    def __init__(self, task: Task, name: str) -> None:
        self.seed, self.victim, self._name = task.seed, task.victim, name

    @property
    def name(self) -> str:
        return self._name


def test_roc_points_by_hand() -> None:
    frr, detected = roc_points(np.array([0.1, 0.3]), np.array([0.2, 0.4]))
    assert frr.tolist() == [0, 0, 50, 50, 100] and detected.tolist() == [0, 50, 50, 100, 100]
    assert np.trapezoid(detected, frr) / 100 == auroc(np.array([0.1, 0.3]), np.array([0.2, 0.4]))


def outcomes(results: Results) -> dict[str, str]:
    return {claim.name: claim.outcome for claim in claims.claims(results, PROFILES["paper"])}


def test_claims_are_supported_by_good_runs(tmp_path: Path) -> None:
    found = made(tmp_path, WHOLE, {THEN: (89, 12)}, items=MAIN)
    assert set(outcomes(found).values()) == {criteria.SUPPORTED}
    first = claims.claims(found, PROFILES["paper"])[0]
    assert first.name == "erases-word-triggers" and first.source == "abstract, arXiv 2405.11227"
    assert len(first.runs) == 8, "two attacks, two seeds, before and after"
    assert {claim.verdict for claim in claims.claims(found, QUICK)} == {claims.NO_VERDICT}


def test_claims_are_refuted_by_bad_runs(tmp_path: Path) -> None:
    found = made(tmp_path, WHOLE, {METHOD: (85, 62), THEN: (86, 70), STATISTICS: (88, 62), "ONION": (85, 40),
                                   "BadActs, dealt anew": (70, 61)}, shift=0.0, items=MAIN)
    assert set(outcomes(found).values()) == {criteria.REFUTED}


def test_few_pairs_and_weak_attacks_decide_nothing(tmp_path: Path) -> None:
    found = made(tmp_path, WHOLE, items=MAIN)
    one = outcomes(Results(found.store, [entry for entry in found.entries if entry.task.seed == 0]))
    assert {one[name] for name in ("detection-first", "keeps-more-than-words", "optimisation-adds", "units-adds")} == \
        {criteria.UNDECIDED}, "four pairs"
    assert one["erases-feature-triggers"] == one["detects-feature-triggers"] == criteria.UNDECIDED, "one seed"
    weak = outcomes(made(tmp_path / "weak", WHOLE, {"Before": (90, 30)}, items=MAIN))
    assert weak["erases-word-triggers"] == weak["detects-feature-triggers"] == criteria.UNDECIDED
    assert weak["optimisation-adds"] == criteria.NOT_RUN, "no pair on a working backdoor"


def test_another_encoder_gives_no_verdict_on_the_paper() -> None:
    refuted = criteria.Claim("BadActs (Findings of ACL 2024)", "n", "s", "source", "c", criteria.REFUTED,
                             criteria.REFUTED, "", "evidence", (), ())
    small = replace(PROFILES["paper"], encoder="minilm-l6")
    assert departure(PAPER, PROFILES["paper"]) == departure("nad", small) == ""
    found = claims.scaled(refuted, small, departure(PAPER, small))
    assert found.verdict == criteria.UNDECIDED and found.outcome == criteria.REFUTED
    assert "not supported with minilm-l6 in the place of" in found.evidence and found.scale.startswith("minilm-l6")
    assert claims.scaled(refuted, PROFILES["paper"]).verdict == criteria.REFUTED
    alone = Selection("paper", attacks=("BadNets",), defenses=("BadActs",)).profile
    assert alone.note == "the exact protocol; only BadNets; BadActs"
    found = claims.scaled(refuted, alone, departure(PAPER, alone))
    assert found.verdict == criteria.UNDECIDED and "with nothing but BadNets; BadActs: no verdict" in found.evidence
