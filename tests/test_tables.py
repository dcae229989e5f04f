"""Tables from fixed synthetic runs: numbers, marks, gaps and every output format."""

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from reproduce.metrics import metrics, wilson
from reproduce.protocols import PROFILES, Entry, mcldef
from reproduce.results import Results
from reproduce.statistics import Interval, holm, paired_difference
from reproduce.store import Store
from tables import layout, nad, render
from tables import mcldef as mcldef_tables
from tables.layout import PUBLISHED, Pair, estimate, over_attacks, possible
from tests.synthetic import Stub, results, write_run


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results(tmp_path_factory.mktemp("two"), seeds=2)


@pytest.fixture(scope="module")
def tables(two: Results) -> dict[str, render.Table]:
    return {table.name: table for table in nad.tables(two)}


def small(root: Path) -> Results:
    """Two attacks, three defenses, two seeds, one missing run and one attack that does not take."""
    store, entries = Store(root), []
    for seed in (0, 1):
        for attack, before in (("BadNets", 99), ("SIG", 30)):
            for defense, acc, asr in (("Before", 88, before), ("FT", 85, 30), ("NAD", 84, 5)):
                labels = {"attack": attack, "defense": defense, "variant": "-" if defense == "Before" else "described"}
                task = Stub(f"{attack}-{defense}", seed)
                entries.append(Entry("nad", "main", labels, task))
                if (attack, defense, seed) != ("SIG", "FT", 1):
                    write_run(store, task, acc, asr, 100 * seed + len(entries))
    return Results(store, entries)


def test_seconds_count_the_run_that_a_cell_starts_from(tmp_path: Path) -> None:
    entries = [entry for entry in mcldef.entries(dataclasses.replace(PROFILES["paper"], seeds=(0,)))
               if (entry.item, entry.labels.get("attack")) == ("main", "BadNets")
               and entry.labels["defense"] in ("NC", mcldef.METHOD, mcldef.ESTIMATED)]
    store, tasks = Store(tmp_path), {entry.labels["defense"]: entry.task for entry in entries}
    for place, task in enumerate(tasks.values()):
        write_run(store, task, 90, 9, seed=place)       # a second each
    seconds = Results(store, entries).frame("mcldef", "main").set_index("defense").seconds
    assert seconds.to_dict() == {"NC": 1, mcldef.METHOD: 1, mcldef.ESTIMATED: 2}, "its masks are those of NC's run"
    for phase, total in (("purification", 2), ("inversion", 1)):
        control = next(entry for entry in mcldef.entries(dataclasses.replace(PROFILES["paper"], seeds=(0,)))
                       if entry.labels.get("defense") == mcldef.RANDOM and entry.labels["attack"] == "BadNets")
        own = Results(Store(tmp_path / phase), [control])
        for task, begins in ((tasks[mcldef.METHOD], "inversion"), (control.task, phase)):
            write_run(own.store, task, 90, 9, seed=1, history=[{"phase": begins, "epoch": 1}])
        assert own.frame("mcldef", "main").seconds.tolist() == [total], "a run that inverted by itself took all of it"
    without = Results(Store(tmp_path / "other"), entries)
    write_run(without.store, tasks[mcldef.ESTIMATED], 90, 9, seed=0)
    assert without.frame("mcldef", "main").seconds.isna().all(), "not known without NC's"


def test_intervals_end_where_the_measure_does() -> None:
    def paired(*values: float) -> list[Pair]:
        return [Pair(str(i), max(value, 0.0), max(-value, 0.0), "", "") for i, value in enumerate(values)]

    # t(1) is 12.7: plus and minus some 1,000 points
    assert over_attacks(paired(90.0, -80.0), "asr") == Interval(5.0, -100.0, 100.0)
    assert over_attacks(paired(90.0, -80.0), "seconds").high > 1000
    narrow = over_attacks(paired(5.0, 5.5, 6.0), "asr")
    assert 0 < narrow.low < 5 and 6 < narrow.high < 100
    assert math.isnan(over_attacks(paired(3.0), "asr").high), "a single value has no interval, not the widest one"


GOLDEN = """\
# NAD: attacks and defenses as described
# Profile paper (the exact protocol); dataset cifar10, model wrn-16-1; seeds 0, 1; 11 finished runs, on a test.
attack,defense,measure,n,mean,sd,low,high,interval,mark,runs
BadNets,Before,asr,2,99.3056,0.589256,94.0113,100,t,,BadNets-Before-s0 BadNets-Before-s1
BadNets,Before,acc,2,88.25,2.47487,66.0141,100,t,,BadNets-Before-s0 BadNets-Before-s1
BadNets,FT,asr,2,33.0556,1.96419,15.408,50.7031,t,,BadNets-FT-s0 BadNets-FT-s1
BadNets,FT,acc,2,84.25,1.06066,74.7203,93.7797,t,tied,BadNets-FT-s0 BadNets-FT-s1
BadNets,NAD,asr,2,7.77778,0.392837,4.24828,11.3073,t,best,BadNets-NAD-s0 BadNets-NAD-s1
BadNets,NAD,acc,2,85.125,0.176777,83.5367,86.7133,t,best,BadNets-NAD-s0 BadNets-NAD-s1
SIG,Before,asr,2,31.5278,1.76777,15.645,47.4105,t,,SIG-Before-s0 SIG-Before-s1
SIG,Before,acc,2,85.75,4.24264,47.6314,100,t,,SIG-Before-s0 SIG-Before-s1
SIG,FT,asr,1,31.6667,,27.0765,36.6439,Wilson,,SIG-FT-s0
SIG,FT,acc,1,84.75,,80.8976,87.9413,Wilson,,SIG-FT-s0
SIG,NAD,asr,2,5.83333,2.74986,0,30.5398,t,,SIG-NAD-s0 SIG-NAD-s1
SIG,NAD,acc,2,84.625,3.35876,54.4478,100,t,,SIG-NAD-s0 SIG-NAD-s1
"average, all (2)",Before,asr,3,64.7917,,0,100,t over attacks,,BadNets-Before-s0 SIG-Before-s0 BadNets-Before-s1
"average, all (2)",FT,asr,3,32.3611,,23.5374,41.1849,t over attacks,,BadNets-FT-s0 SIG-FT-s0 BadNets-FT-s1
"average, all (2)",NAD,asr,3,7.77778,,7.77778,7.77778,t over attacks,,BadNets-NAD-s0 SIG-NAD-s0 BadNets-NAD-s1
"average, all (2)",Before,acc,3,85.5,,50.5579,100,t over attacks,,BadNets-Before-s0 SIG-Before-s0 BadNets-Before-s1
"average, all (2)",FT,acc,3,84.5,,81.3234,87.6766,t over attacks,,BadNets-FT-s0 SIG-FT-s0 BadNets-FT-s1
"average, all (2)",NAD,acc,3,83.6875,,65.4223,100,t over attacks,,BadNets-NAD-s0 SIG-NAD-s0 BadNets-NAD-s1
"average, working backdoors (1)",Before,asr,2,99.3056,,94.0113,100,t over seeds,,BadNets-Before-s0 BadNets-Before-s1
"average, working backdoors (1)",FT,asr,2,33.0556,,15.408,50.7031,t over seeds,,BadNets-FT-s0 BadNets-FT-s1
"average, working backdoors (1)",NAD,asr,2,7.77778,,4.24828,11.3073,t over seeds,,BadNets-NAD-s0 BadNets-NAD-s1
"average, working backdoors (1)",Before,acc,2,88.25,,66.0141,100,t over seeds,,BadNets-Before-s0 BadNets-Before-s1
"average, working backdoors (1)",FT,acc,2,84.25,,74.7203,93.7797,t over seeds,,BadNets-FT-s0 BadNets-FT-s1
"average, working backdoors (1)",NAD,acc,2,85.125,,83.5367,86.7133,t over seeds,,BadNets-NAD-s0 BadNets-NAD-s1
"""


def test_golden_main_table(tmp_path: Path) -> None:
    table = next(table for table in nad.tables(small(tmp_path)) if table.name == "nad-main")
    assert render.csv(table, PROFILES["paper"]) == GOLDEN
    assert table.frame.iloc[1, 0] == "SIG †"
    assert str(table.frame.loc[1, ("FT", "ASR")]).endswith("]"), "one seed shows its Wilson interval"
    assert list(table.frame["", "Attack"]) == ["BadNets", "SIG †", "Average", "Average, without †"]


def test_no_run_prints_no_zero(tmp_path: Path) -> None:
    entries = [Entry("nad", "main", {"attack": "BadNets", "defense": defense, "variant": "described"}, Stub(defense, 0))
               for defense in ("FT", "NAD")]
    table = next(table for table in nad.tables(Results(Store(tmp_path), entries)) if table.name == "nad-main")
    assert {str(value) for value in table.frame.iloc[0, 2:]} == {"-"}
    assert "| - |" in render.markdown(table, PROFILES["paper"])


def test_absent_items_are_skipped(tmp_path: Path) -> None:
    assert {table.name for table in nad.tables(small(tmp_path))}.isdisjoint({"nad-beta", "nad-epochs"})
    assert nad.tables(Results(Store(tmp_path), [])) == []


def test_every_item_has_its_table(tables: dict[str, render.Table]) -> None:
    assert set(tables) == {f"nad-{name}" for name in (
        "main", "main-released-defenses", "main-released", "published", "published-peers", "main-complete",
        "main-averages", "main-significance", "main-significance-2", "main-by-attack", "main-by-attack-2",
        "main-released-complete", "main-released-averages", "main-released-significance",
        "main-released-significance-2", "main-released-by-attack", "main-released-by-attack-2", "clean-fraction",
        "attention", "distillation", "teacher", "beta", "variants", "augmentation", "mcr", "epochs", "cost")}


def test_estimate_of_one_seed_is_wilsons(two: Results) -> None:
    row = two.frame("nad", "beta").iloc[:1]
    value = estimate(row, "asr")
    assert (value.low, value.high) == wilson(round(row.asr.iloc[0] / 100 * 360), 360)


def test_an_excess_is_of_the_same_images_with_and_without_the_trigger(two: Results) -> None:
    row = two.frame("nad", "beta").iloc[:1]
    hits = two.hits(row.run.iloc[0])
    base = 100 * hits["base_rate"].mean()
    assert row.base_rate.iloc[0] == base > 0 and row.excess.iloc[0] == pytest.approx(row.asr.iloc[0] - base)
    value = estimate(row, "excess")
    assert value.method == "paired" and value.low < value.mean < value.high
    assert value.interval == paired_difference(hits["asr"], hits["base_rate"])


def test_a_run_that_did_not_store_its_base_rate_has_one_from_its_predictions(tmp_path: Path,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    new = small(tmp_path / "new").frame("nad", "main")
    monkeypatch.setattr("tests.synthetic.metrics", lambda predictions: {
        key: value for key, value in metrics(predictions).items() if key != "base_rate"})
    old = small(tmp_path / "old")
    assert "base_rate" not in old.finished(old.entries[0].task.name).json("metrics")
    assert old.frame("nad", "main").equals(new)


def test_an_excess_may_be_negative_and_is_never_called_best(two: Results) -> None:
    assert possible(Interval(-1.0, -3.0, 2.0), "excess") == Interval(-1.0, -3.0, 2.0)
    assert possible(Interval(1.0, -3.0, 2.0), "asr").low == 0.0
    frame = two.frame("nad", "main").query("variant != 'released'")
    keys = ["attack", "defense"]
    data = layout.mark(two, frame, layout.estimates(frame, keys, ("asr", "excess")), keys, ["attack"])
    assert set(data[data.measure == "asr"]["mark"]) >= {"best", ""}
    assert set(data[data.measure != "asr"]["mark"]) == {""}
    assert "Bold" in layout.legend(["asr"]) and "Bold" not in layout.legend(["excess"])


def test_before_is_never_marked(tables: dict[str, render.Table]) -> None:
    data = tables["nad-main"].data
    assert set(data.mark[data.defense == "Before"]) == {""}
    best = data[(data.mark == "best") & (data.measure == "asr")]
    assert len(best) == 6, "one best per attack"
    for row in best.itertuples():
        others = data[(data.attack == row.attack) & (data.measure == "asr") & (data.defense != "Before")]
        assert row.mean == others["mean"].min()


def test_a_victim_in_a_table_of_one_factor_is_not_marked_either(tmp_path: Path) -> None:
    store, entries = Store(tmp_path), []
    for threshold, labels, asr in (("none: the victim", {"defense": "Before"}, 10), ("a", {}, 60), ("b", {}, 90)):
        entries.append(Entry("mcldef", "anp-threshold", {"attack": "BadNets", "threshold": threshold, **labels},
                             Stub(threshold.replace(" ", ""), 0)))
        entries.append(dataclasses.replace(entries[-1], task=Stub(threshold.replace(" ", ""), 1)))
        for entry in entries[-2:]:
            write_run(store, entry.task, 80, asr, len(entries))
    data = next(table for table in mcldef_tables.tables(Results(store, entries))
                if table.name == "mcldef-anp-threshold").data
    marks = data[data.measure == "asr"].set_index("threshold")["mark"].to_dict()
    assert marks["none: the victim"] == "" and marks["a"] == render.BEST


def test_rows_that_share_no_seed_are_not_called_worse(tmp_path: Path) -> None:
    store, entries = Store(tmp_path), []
    for defense, seed, asr in (*(("Before", seed, 99) for seed in range(4)),
                               ("FT", 0, 40), ("FT", 1, 41), ("NAD", 2, 5), ("NAD", 3, 6)):
        labels = {"attack": "BadNets", "defense": defense, "variant": "-" if defense == "Before" else "described"}
        entries.append(Entry("nad", "main", labels, Stub(f"BadNets-{defense}", seed)))
        write_run(store, entries[-1].task, 85, asr, len(entries))
    data = next(table for table in nad.tables(Results(store, entries)) if table.name == "nad-main").data
    assert set(data.mark) == {""}


def test_averages_use_common_pairs_only(tables: dict[str, render.Table]) -> None:
    # CL lacks MCR at seed 0 and Refool lacks FP at seed 0: 12 pairs less 2.
    data = tables["nad-main-averages"].data
    described = data[(data.settings == "described") & (data.attacks == "all")]
    assert set(described.n) == {10} and set(described.n_attacks) == {6}
    assert set(data[data.attacks == "working backdoors"].n_attacks) == {5}, "SIG did not take"


def test_significance_is_paired_and_corrected(tables: dict[str, render.Table], two: Results) -> None:
    data = tables["nad-main-significance"].data.set_index(["defense", "settings", "measure"])
    row = data.loc[("FT", "released", "asr")]
    # On SIG the attack did not take.
    frame = two.frame("nad", "main").query("variant == 'released' and attack != 'SIG'").set_index(["attack", "seed"])
    gap = frame[frame.defense == "FT"].asr - frame[frame.defense == nad.CONTROL].asr
    assert row.difference == pytest.approx(gap.groupby("attack").mean().mean())
    assert row.n == 10 and row.p == pytest.approx(2 / 1024) and row.p_holm >= row.p
    assert data.loc[("FT", "released", "acc")].n == 12, "accuracy is lost on any victim"
    assert row.mcnemar_higher > 0 and row.mcnemar_lower == 0


def test_by_attack_is_paired_over_seeds(tables: dict[str, render.Table], two: Results) -> None:
    table = tables["nad-main-by-attack"]
    data = table.data.set_index(["defense", "settings", "attack", "measure"])
    frame = two.frame("nad", "main").query("variant == 'released' and attack == 'BadNets'").set_index("seed")
    gap = frame[frame.defense == "FT"].asr - frame[frame.defense == nad.CONTROL].asr
    row = data.loc[("FT", "released", "BadNets", "asr")]
    wanted = stats.ttest_1samp(gap, 0)
    assert (row.difference, row.p) == pytest.approx((gap.mean(), wanted.pvalue))
    assert (row.low, row.high) == pytest.approx(tuple(wanted.confidence_interval()))
    family = data[(data.index.get_level_values("attack") == "BadNets") & (data.index.get_level_values(3) == "asr")]
    assert len(family) == 6 and family.p_holm.to_list() == holm(family.p.to_list()), "FT, FP, MCR, NAD; FT, NAD"
    weak = data.index.get_level_values("attack") == "SIG"
    assert set(data.index[weak].get_level_values("measure")) == {"acc"}, "the attack did not take"
    # MCR has one seed on CL: a difference, and no interval.
    one = table.frame[(table.frame.Defense == "MCR") & (table.frame.Measure == "ASR")].CL.item()
    assert re.fullmatch(r"[+-]\d+\.\d", str(one))


def test_equal_differences_have_no_interval(tmp_path: Path) -> None:
    store, entries = Store(tmp_path), []
    for seed in (0, 1):
        for defense, asr in (("Before", 99), ("FT", 35), (nad.CONTROL, 35), ("NAD", 5 - seed)):
            labels = {"attack": "BadNets", "defense": defense, "variant": "-" if defense == "Before" else "described"}
            entries.append(Entry("nad", "main", labels, Stub(defense, seed)))
            write_run(store, entries[-1].task, 85, asr, seed)
    table = next(t for t in nad.tables(Results(store, entries)) if t.name == "nad-main-by-attack")
    shown = table.frame[table.frame.Measure == "ASR"].set_index("Defense").BadNets.map(str).to_dict()
    assert shown["FT"] == "+0.0" and "[" in shown["NAD"]


def test_one_seed_has_no_table_by_attack(tmp_path: Path) -> None:
    both = small(tmp_path)
    one = Results(both.store, [entry for entry in both.entries if entry.task.seed == 0])
    assert [[table.name for table in nad.tables(found) if "by-attack" in table.name] for found in (both, one)] == [
        ["nad-main-by-attack-2"], []], "against FT; its own control is not there"


def test_published_gap_and_verdict(tables: dict[str, render.Table], two: Results) -> None:
    data = tables["nad-published"].data
    row = data[(data.what == "Before") & (data.measure == "acc_nontarget")].iloc[0]
    ours = two.frame("nad", "main").query("attack == 'BadNets' and defense == 'Before'").acc_nontarget
    assert row.gap == pytest.approx(ours.mean() - 85.65)
    assert set(data.verdict) <= {"agrees", "undecided", "ours is lower", "ours is higher", "context"}
    smoke = next(table for table in nad.tables(two, smoke=True) if table.name == "nad-published")
    assert smoke.data.gap.isna().all() and set(smoke.data.verdict) == {"smoke scale: not comparable", "context"}


def test_published_values_all_have_a_source() -> None:
    values = json.loads((PUBLISHED / "nad.json").read_text())
    for block in [*values["rows"], values["log"], values["peers"], *values["claims"].values()]:
        assert block["source"]
    for row in values["rows"]:
        assert {"what", "setting", "unit", "caveat", "compare"} <= set(row)
    assert 'recall' not in json.dumps(values).lower()


def test_epochs_skip_the_teacher_and_show_the_log(tables: dict[str, render.Table]) -> None:
    frame = tables["nad-epochs"].frame
    assert list(frame["", "Epoch"]) == ["0", "1", "2", "3", "4", "5"]
    assert str(frame.loc[1, ("Published log", "ASR")]) == "9.60"
    assert set(tables["nad-epochs"].data.n) == {2}


@pytest.mark.parametrize("name", ["nad-main", "nad-published", "nad-attention", "nad-cost"])
def test_every_format_is_well_formed(tables: dict[str, render.Table], name: str, tmp_path: Path) -> None:
    table = tables[name]
    render.write(table, tmp_path, PROFILES["quick"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".md", ".tex", ".html"}
    csv = (tmp_path / f"{name}.csv").read_text()
    assert len(pd.read_csv(io.StringIO(csv), comment="#")) == len(table.data)
    latex = (tmp_path / f"{name}.tex").read_text()
    body = [line for line in latex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(table.frame.columns) - 1}
    assert not re.search(r"(?<!\\)[_^|†±]", latex.split(r"\midrule")[1].replace(r"\label", "").split(r"\bottomrule")[0])
    markdown = [line for line in (tmp_path / f"{name}.md").read_text().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in markdown} == {len(table.frame.columns) + 1}
    html = (tmp_path / f"{name}.html").read_text()
    assert html.count("<tr>") == html.count("</tr>") and "smoke scale" in html
    for text in (csv, latex, html, "\n".join(markdown)):
        assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    if name == "nad-main":
        assert 'title="main-BadNets-FT-described-s0 main-BadNets-FT-described-s1"' in html


def test_text_is_aligned(tables: dict[str, render.Table]) -> None:
    lines = render.text(tables["nad-main"], brief=True).splitlines()
    assert "±" not in "\n".join(lines) and "*" in "\n".join(lines)
    rule = next(line for line in lines if set(line) == {"-"})
    assert max(map(len, lines)) <= len(rule)


def test_a_model_that_is_no_classifier_any_more_is_not_best_and_says_why(tmp_path: Path) -> None:
    store, entries = Store(tmp_path), []
    for defense, acc, asr in (("Before", 88, 99), ("FT", 85, 30), ("NAD", 84, 20), ("Random", 60, 0), ("Mild", 70, 10)):
        labels = {"attack": "BadNets", "defense": defense, "variant": "-" if defense == "Before" else "described"}
        for seed in range(4):
            entries.append(Entry("nad", "main", labels, Stub(f"BadNets-{defense}", seed)))
            write_run(store, entries[-1].task, acc, asr, len(entries))
    table = next(table for table in nad.tables(Results(store, entries)) if table.name == "nad-main")
    data = table.data[table.data.attack == "BadNets"]
    marks = data[data.measure == "asr"].set_index("defense")["mark"].to_dict()
    assert marks["Random"] == render.WRECKED and marks["Mild"] == render.BEST and marks["NAD"] != render.WRECKED
    assert set(data[data.defense == "Random"]["mark"]) == {render.WRECKED, ""}
    assert "‡ ACC more than 20 points below the victim's" in table.caption
    whole = next(table for table in nad.tables(Results(store, entries)) if table.name == "nad-main-complete").data
    random = whole[whole.defense == "Random"].set_index("measure")["mark"]
    assert random["asr"] == random["excess"] == render.WRECKED and random["acc"] == ""
    profile = PROFILES["paper"]
    assert " ‡ |" in render.markdown(table, profile) and r"$\ddagger$" in render.latex(table, profile)
    assert "‡" in render.html(table, profile)
    assert re.search(r" \d\.\d‡", render.text(table, brief=True))


@pytest.mark.parametrize(("processors", "said"), [
    ((), "2 finished runs."), ((("a", 2),), "2 finished runs, on a."),
    ((("a", 2), ("b", 1)), "2 finished runs, on a (2) and b (1).")])
def test_what_was_computed_on_two_processors_says_so(processors: tuple[tuple[str, int], ...], said: str) -> None:
    table = render.Table("t", "T", "", pd.DataFrame(), pd.DataFrame(), (0,), ("x", "y"), processors=processors)
    assert render.provenance(table, PROFILES["paper"]).endswith(said)


def test_processors_are_counted_by_run(tmp_path: Path) -> None:
    found = small(tmp_path)
    frame = found.frame("nad", "main").assign(processor=["a"] * 7 + ["b"] * 5)
    assert set(found.frame("nad", "main").processor.dropna()) == {"a test"}
    counted = layout.table("t", "T", "", frame, frame, pd.concat([frame, frame])).processors
    assert counted == (("a", 7), ("b", 4)), "a run that two tables share once, and one is not there"
