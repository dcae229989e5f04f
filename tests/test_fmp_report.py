"""FMP's tables, figures and claims, from its whole protocol with made-up runs."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from defenses.fmp import FAULTS
from figures import fmp as figures
from reproduce import claims
from reproduce.cells import Victim
from reproduce.claims import criteria
from reproduce.claims import fmp as fmp_claims
from reproduce.protocols import BEFORE, NEVER, PROFILES, Entry, departure, entries
from reproduce.protocols.fmp import (
    ALL_IMAGES,
    BASELINES,
    BEFORE_ANY,
    IDLE,
    LATER,
    METHOD,
    NO_PRUNING,
    NOT_OF_WIDE_RESNET,
    PAPER,
    RANDOM,
    unpoisoned,
)
from reproduce.report import write_report
from reproduce.results import Results
from reproduce.store import Store
from tables import fmp as tables
from tables import render
from tables.fmp import ALL, CLEAN
from tables.layout import estimate
from tests.drawn import shows
from tests.synthetic import write_run

QUICK = PROFILES["quick"]
# (ACC, ASR) in percent.
LEVELS = {"Before": (90, 98), METHOD: (88, 2), NO_PRUNING: (88, 30), RANDOM: (87, 30), IDLE: (86, 31), "ANP": (85, 80)}
OTHERS = (86, 40)
# Two convolutions, whose maps the trigger moves the more the later they come; a third is too narrow to be pruned.
NAMES, SIZES = ("stem", "conv1", "conv2"), (2, 8, 16)
CHANGE = np.concatenate([np.arange(size) for size in SIZES]).astype(np.float32)
LAYER = np.repeat(np.arange(3), SIZES).astype(np.int32)
TABLES = {*(f"{item}{measure}" for item in ("main", "main-released", "five-percent")
            for measure in ("", "-excess", "-acc", "-ra")),
          "worth", "carriers", "main-complete", "main-averages",
          "main-significance", "main-significance-2", "main-significance-3", "five-percent-complete",
          "five-percent-averages", "five-percent-significance-3", "clean-fraction", "epsilon", "p", "images", "tuning",
          "poison-rate", "faults", "cost"}


def pruned(last: bool, scored: bool) -> dict[str, torch.Tensor]:
    """What a run that prunes one map of each convolution keeps: the one moved most, or the one moved least."""
    mask = torch.zeros(sum(SIZES[1:]), dtype=torch.bool)
    mask[[7, 23] if last else [0, 8]] = True
    found = {"layer": torch.tensor([0] * SIZES[1] + [1] * SIZES[2]), "pruned": mask}
    # By score the first convolution's pruned map stands alone, the second's are all the same.
    order = torch.arange(8.0).flip(0) if last else torch.arange(8.0)
    return {**found, "scores": torch.cat([order, torch.full((16,), 50.0)])} if scored else found


def made(root: Path, found: list[Entry], finds: bool = True) -> Results:
    """Runs of the protocol, at levels that depend on the defense alone; faults add 10 points of ASR. finds: whether FMP
    prunes the maps that the trigger moves most, or those that it moves least."""
    store = Store(root)
    for number, entry in enumerate(found):
        if store.find(entry.task.name):
            continue
        defense = entry.labels.get("defense", METHOD)
        acc, asr = LEVELS.get(defense, OTHERS)
        asr += 10 * ("+" in entry.labels.get("faults", ""))
        own = defense in (METHOD, RANDOM) and not isinstance(entry.task, Victim)
        write_run(store, entry.task, acc, asr, number, info={"layers": list(NAMES[1:])} if own else {},
                  tensors={"defense": pruned(finds and defense == METHOD, defense == METHOD)} if own else {},
                  shown={"map_change": CHANGE, "map_layer": LAYER, "map_layers": np.array(NAMES)}
                  if isinstance(entry.task, Victim) else None)
    return Results(store, found)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return made(tmp_path_factory.mktemp("fmp"), entries(QUICK, [PAPER]))


def test_every_item_has_its_table(results: Results) -> None:
    built = tables.tables(results)
    assert {table.name for table in built} == {f"{PAPER}-{name}" for name in TABLES}
    for table in built:
        for text in (render.markdown(table, QUICK), render.html(table, QUICK)):
            assert not re.search(r"\bnan\b", text, re.IGNORECASE)
        assert "?." not in render.html(table, PROFILES["cpu"])
    assert tables.tables(Results(Store(Path("nowhere")), [])) == []
    unsaid = {table.name for table in built if CLEAN not in table.caption}
    assert unsaid == {table.name for table in built if re.search("five-percent|clean-fraction", table.name)}


def test_what_was_never_poisoned_stands_in_both_grids_and_nowhere_else(results: Results) -> None:
    built = {table.name.removeprefix(f"{PAPER}-"): table for table in tables.tables(results)}
    grids = {f"{item}{measure}" for item in ("main", "main-released") for measure in ("", "-excess", "-acc", "-ra")}
    for name in grids:
        assert list(built[name].frame.Defense)[:3] == [BEFORE, NEVER, "FT"], name
        assert (built[name].data[built[name].data.defense == NEVER]["mark"] == "").all()
    assert not any(NEVER in set(table.data.get("defense", ())) for name, table in built.items() if name not in grids)


def test_what_was_never_poisoned_is_at_hand_wherever_there_are_victims() -> None:
    for profile in PROFILES.values():
        found = entries(profile, [PAPER])
        items = {entry.item for entry in found if entry.item in tables.DATASETS}
        for item in items:
            attacks, met = ({(entry.labels["attack"], entry.task.seed) for entry in found
                             if entry.item == one and entry.labels["defense"] == row}
                            for one, row in ((item, BEFORE), (unpoisoned(item), NEVER)))
            assert attacks == met and attacks, (profile.name, item)


def test_what_two_comparisons_share_is_tested_once(results: Results) -> None:
    frame = results.frame(PAPER, "main")
    shared = frame[frame.variant.isin(["described", "released"])].drop_duplicates(["defense", "variant"])
    assert shared.duplicated(["defense", "settings"]).any(), "NAD's settings, say, stand in both comparisons"
    table = next(table for table in tables.tables(results) if table.name == f"{PAPER}-main-significance-3")
    assert not table.data.duplicated(["defense", "settings", "control", "measure"]).any()


def test_every_item_has_its_figure(results: Results) -> None:
    drawn = figures.figures(results, smoke=True)
    assert {figure.name for figure in drawn} == {f"{PAPER}-{name}" for name in (
        "main", "main-released", "five-percent", "triggers", "maps", "trade-off", "trade-off-five-percent",
        "clean-fraction", "epsilon", "p", "images", "tuning", "poison-rate", "faults")}
    for figure in drawn:
        assert shows(figure), figure.name
    assert figures.figures(Results(Store(Path("nowhere")), [])) == []


def test_a_panel_without_a_run_says_so(tmp_path: Path) -> None:
    found = entries(QUICK, [PAPER], ["main"])
    few = [entry for entry in found if (entry.labels["attack"], entry.labels.get("variant")) != ("SSBA", "released")]
    results = Results(made(tmp_path, few).store, found)
    drawn = next(figure for figure in figures.figures(results) if figure.name == f"{PAPER}-maps").draw()
    said = {axis.get_title(): [text.get_text() for text in axis.texts] for axis in drawn.axes}
    assert said.pop("SSBA, released") == ["not run"] and said and not any(said.values())


def test_every_variant_that_ran_has_its_mark(results: Results) -> None:
    data = next(figure for figure in figures.figures(results, smoke=True) if figure.name == f"{PAPER}-trade-off").data
    names = set(data.series)
    for name in (METHOD, NO_PRUNING):       # the released settings fine-tune otherwise
        assert {f"{name}, described", f"{name}, released"} <= names and name not in names
    assert {RANDOM, "ANP", "Before"} <= names, "the same runs in both"


def test_carriers_are_the_maps_that_the_trigger_moves_most(results: Results) -> None:
    data = next(table for table in tables.tables(results) if table.name == f"{PAPER}-carriers").data
    shares = data.groupby("defense").hits.mean()
    assert shares[METHOD] == 100 and shares[RANDOM] == 0
    ties = {name: set(part.ties.dropna()) for name, part in data.groupby("defense")}
    assert ties == {METHOD: {50.0}, RANDOM: set()}, "one of two, and random maps have no score"
    # One of 8 and one of 16.
    assert data.chance.mean() == pytest.approx(100 * (1 / 8 + 1 / 16) / 2)
    assert data[data.defense == METHOD].change_pruned.mean() == (7 + 15) / 2
    assert data.change_all.iloc[0] == pytest.approx(np.concatenate([np.arange(8), np.arange(16)]).mean())


@pytest.mark.parametrize(("scores", "share"), [((1, 2, 2, 3), 50), ((2, 2, 2, 3), 100), ((1, 2, 3, 3), 0),
                                               ((1, 1, 3, 3), 0)])
def test_ties_decide_where_a_spared_map_scores_like_a_pruned_one(scores: tuple[int, ...], share: float,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    # Two of four maps are pruned, and of a second convolution, all of whose maps score like the first's, none.
    kept = {"layer": np.repeat([0, 1], 4), "scores": np.array([*scores, *scores]),
            "pruned": np.array([True, True, *[False] * 6])}
    monkeypatch.setattr(tables, "_kept", lambda run: kept)
    assert tables._ties(None) == share


def test_worth_of_a_fault_is_the_difference_it_makes(results: Results) -> None:
    table = next(table for table in tables.tables(results) if table.name == f"{PAPER}-worth")
    data = table.data
    assert set(data.fault) == {"noise", "leak"} < set(FAULTS)
    added = data[(data.comparison == "Added to described") & (data.measure == "asr")]
    frame = results.frame(PAPER, "faults")
    for row in added.itertuples():
        gap = [estimate(frame[(frame.faults == name) & (frame.attack == row.attack)], "asr").mean
               for name in (f"described + {row.fault}", "described")]
        assert row.difference == pytest.approx(gap[0] - gap[1])
    assert added.difference.mean() == pytest.approx(10, abs=3)


def test_faults_on_published_checkpoints(tmp_path: Path) -> None:
    found = entries(replace(PROFILES["cpu"], seeds=(0,)), [PAPER], ["published-faults"])
    assert not [entry for entry in entries(QUICK, [PAPER]) if entry.item == "published-faults"]
    victims = {entry.task.published for entry in found if isinstance(entry.task, Victim)}
    assert len(victims) == 3 and all(entry.on_request for entry in found)
    cells = {entry.labels["faults"]: entry.task.config for entry in found if not isinstance(entry.task, Victim)}
    assert {config.p for config in cells.values()} == {16}
    assert {name for name, config in cells.items() if config.images is None} == {ALL_IMAGES}
    assert replace(cells[ALL_IMAGES], images=256) == cells["described"]
    in_full = entries(replace(PROFILES["paper"], seeds=(0,)), [PAPER], ["published-faults"])
    assert ALL_IMAGES not in {entry.labels["faults"] for entry in in_full}
    assert cells[ALL_IMAGES] in [entry.task.config for entry in in_full if entry.labels["faults"] == "described"]
    results = made(tmp_path, found)
    built = {table.name: table.data for table in tables.tables(results)}
    assert set(built[f"{PAPER}-carriers-published"].hits) == {100.0}
    listed = built[f"{PAPER}-published-faults"]
    assert not listed[listed.faults == BEFORE_ANY].mark.any(), "no defense is compared with the victim"
    data = built[f"{PAPER}-worth-published"]
    added = data[(data.comparison == "Added to described") & (data.measure == "asr") & (data.fault == "leak")]
    one, three = added[added.attack != ALL], added[added.attack == ALL].iloc[0]
    assert len(one) == 3 and three.n == 3
    assert three.difference == pytest.approx(one.difference.mean())
    assert three.low <= one.difference.min() + 1e-9 and three.high >= one.difference.max() - 1e-9
    choice = built[f"{PAPER}-choice-published"]
    assert len(choice) == 8 and set(choice.n) == set(choice.n_attacks) == {3}, "four controls, ASR and ACC"
    idle = choice[(choice.control == "described, least active maps") & (choice.measure == "asr")].iloc[0]
    means = listed[listed.measure == "asr"].set_index(["attack", "faults"])["mean"].unstack()
    assert idle.difference == pytest.approx((means["described"] - means["described, least active maps"]).mean())
    checks = {claim.name: claim.checks[0] for claim in claims.claims(results, PROFILES["cpu"])}
    assert set(checks) == {f"published-{name}-adds" for name in ("pruning", "scoring", "adversarial-scoring")}
    assert checks["published-adversarial-scoring-adds"].value == pytest.approx(idle.difference)
    assert {(check.n, check.outcome) for check in checks.values()} == {(3, criteria.UNDECIDED)}, "three pairs are few"
    assert {claim.scale for claim in claims.claims(results, PROFILES["cpu"])} == {
        "published WRN-16-1 checkpoints in place of FMP's own victims"}
    faults = {entry.labels["faults"].split(" ")[-1] for entry in found if " " in entry.labels["faults"]}
    assert {"noise", "leak"} <= faults and faults.isdisjoint(NOT_OF_WIDE_RESNET)
    assert {entry.labels["attack"] for entry in found if "normalised" in entry.labels["faults"]} == {"MCLDef's"}
    page = write_report(results, PROFILES["cpu"], tmp_path / "report", "").page.read_text()
    assert "no victim: all are published checkpoints" in page and "victims to" not in page
    assert "(victims as published, what takes long in a defense cut)" in page and "cut to 12 epochs)" not in page
    figure = next(figure for figure in figures.figures(results) if figure.name == f"{PAPER}-published-faults")
    assert set(figure.data.attack) == {"NAD's", "ARGD's", "MCLDef's"}
    assert "Several attacks" not in figure.caption


@pytest.mark.parametrize(("same", "correlation"), [(100.0, 1.0), (0.0, -1.0)])
def test_maps_chosen_again(tmp_path: Path, same: float, correlation: float) -> None:
    found = entries(replace(PROFILES["cpu"], seeds=(0, 1)), [PAPER], ["published-faults"])
    made(tmp_path, [entry for entry in found if entry.task.seed == 0])
    results = Results(made(tmp_path, found, finds=same == 100).store, found)
    data = next(table for table in tables.tables(results) if table.name == f"{PAPER}-again-published").data
    assert set(data.same) == {same} and set(data.correlation.round(9)) == {correlation}
    assert set(data.chance) == {100 * (1 / 8 + 1 / 16) / 2} and BEFORE_ANY not in set(data.settings)


def test_what_has_not_run_everywhere_is_no_row_of_all_and_keeps_its_place(tmp_path: Path) -> None:
    found = entries(replace(PROFILES["cpu"], seeds=(0,)), [PAPER], ["published-faults"])
    results = Results(made(tmp_path, [entry for entry in found if entry.labels["attack"] != "NAD's"
                                      or entry.labels["faults"] in (BEFORE_ANY, "described", "released")]).store, found)
    data = next(table for table in tables.tables(results) if table.name == f"{PAPER}-worth-published").data
    assert len(data) and ALL not in set(data.attack)
    drawn = next(figure for figure in figures.figures(results) if figure.name == f"{PAPER}-published-faults").data
    assert list(dict.fromkeys(drawn.faults)) == list(dict.fromkeys(entry.labels["faults"] for entry in found))


def test_claims(tmp_path: Path) -> None:
    six = [entry for entry in entries(PROFILES["paper"], [PAPER], ["main"])
           if entry.labels["attack"] in ("BadNets", "SSBA")]
    found = {claim.name: claim for claim in claims.claims(made(tmp_path, six), PROFILES["paper"])}
    assert set(found) == {f"{name}{ending}" for name in ("asr", "ra", "least-gap", "largest-gap", "maps")
                          for ending in ("", "-released")} | {
        f"{name}-adds" for name in ("pruning", "scoring", "adversarial-scoring")}
    assert found["asr"].outcome == criteria.SUPPORTED and found["least-gap"].outcome == criteria.SUPPORTED
    # ANP leaves 78 points more.
    assert found["largest-gap"].outcome == criteria.SUPPORTED and "ANP" in found["largest-gap"].evidence
    assert found["pruning-adds"].outcome == criteria.SUPPORTED
    # Six runs of BadNets; the made-up ones prune the maps that the trigger moves most.
    maps = found["maps"].checks[0]
    assert (found["maps"].outcome, maps.value, maps.n) == (criteria.SUPPORTED, 100, 6)
    assert all(claim.source for claim in found.values())
    narrow = claims.scaled(found["asr"], PROFILES["cpu"], departure(PAPER, PROFILES["cpu"]))
    assert narrow.verdict == criteria.UNDECIDED and "no verdict on the paper" in narrow.evidence


@pytest.mark.parametrize(("attacks", "outcome"), [(7, criteria.SUPPORTED), (6, criteria.UNDECIDED)])
def test_controls_on_gtsrb_need_all_seven_attacks_of_one_seed(tmp_path: Path, attacks: int, outcome: str) -> None:
    found = entries(PROFILES["cpu"], [PAPER], ["gtsrb"])
    names = list(dict.fromkeys(entry.labels["attack"] for entry in found))
    assert len(names) == 7 and {entry.task.seed for entry in found} == {0}
    ran = [entry for entry in found if entry.labels["attack"] in names[:attacks]]
    results = Results(made(tmp_path, ran).store, found)
    made_claims = claims.claims(results, PROFILES["cpu"])
    assert {claim.name for claim in made_claims} == {
        f"gtsrb-{name}-adds" for name in ("pruning", "scoring", "adversarial-scoring")}
    assert {(claim.outcome, claim.checks[0].n) for claim in made_claims} == {(outcome, attacks)}
    assert {claim.verdict for claim in made_claims} == {criteria.UNDECIDED}, "the network is narrow"
    data = next(table for table in tables.tables(results) if table.name == f"{PAPER}-carriers-gtsrb").data
    assert data[data.defense == METHOD].attack.nunique() == attacks and set(data.defense) == {METHOD, RANDOM}


def test_maps_that_the_trigger_hardly_moves_are_not_the_backdoors(tmp_path: Path) -> None:
    found = [entry for entry in entries(PROFILES["paper"], [PAPER], ["main"])
             if entry.labels["attack"] == "BadNets" and entry.labels["defense"] in (BEFORE, METHOD)]
    judged = {claim.name: claim for claim in claims.claims(made(tmp_path, found, finds=False), PROFILES["paper"])}
    assert {(judged[name].outcome, judged[name].checks[0].value) for name in ("maps", "maps-released")} == {
        (criteria.REFUTED, 0)}


def over_seeds(seeds: int, **asr: float) -> pd.DataFrame:
    """Rows of one defense at these levels; an attack at NaN has entries, but no run."""
    return pd.DataFrame([{"attack": attack, "defense": "Before", "seed": seed, "asr": value + 0.1 * seed,
                          "status": "missing" if math.isnan(value) else "done"}
                         for attack, value in asr.items() for seed in range(seeds)])


@pytest.mark.parametrize(("second", "outcome"), [(3.2, criteria.SUPPORTED), (40.0, criteria.UNDECIDED),
                                                 (1.5, criteria.SUPPORTED), (math.nan, criteria.UNDECIDED)])
def test_a_wide_interval_or_a_missing_attack_supports_no_average(second: float, outcome: str) -> None:
    table = {"Before": over_seeds(6, BadNets=99.0, SSBA=98.0), METHOD: over_seeds(6, BadNets=2.0, SSBA=second)}
    assert fmp_claims._average(table, "asr", 2.86).outcome == outcome


@pytest.mark.parametrize(("seeds", "outcome"), [(6, criteria.SUPPORTED), (2, criteria.UNDECIDED)])
def test_an_average_needs_enough_runs_of_attacks_that_took(seeds: int, outcome: str) -> None:
    table = {"Before": over_seeds(seeds, BadNets=99.0, SSBA=9.0), METHOD: over_seeds(seeds, BadNets=1.0, SSBA=50.0)}
    check = fmp_claims._average(table, "asr", 2.86)
    assert check.outcome == outcome and check.n == seeds and "without SSBA" in check.text


def test_one_baseline_does_not_speak_for_all_seven(tmp_path: Path) -> None:
    found = [entry for entry in entries(replace(PROFILES["paper"], seeds=tuple(range(6))), [PAPER], ["main"])
             if entry.labels["attack"] == "BadNets"]
    few = [entry for entry in found if entry.labels["defense"] in ("Before", METHOD, "FT")]
    results = Results(made(tmp_path, few).store, found)
    least = next(claim for claim in claims.claims(results, PROFILES["paper"]) if claim.name == "least-gap")
    assert least.outcome == criteria.UNDECIDED and len(least.checks) == len(BASELINES) - 2
    assert {check.subject for check in least.checks}.isdisjoint(LATER)
    assert {check.outcome for check in least.checks} == {criteria.SUPPORTED, criteria.NOT_RUN}


def test_a_narrow_network_loses_as_many_maps_of_a_layer() -> None:
    described = {entry.task.config.p for entry in entries(PROFILES["paper"], [PAPER])
                 if entry.item == "main" and entry.labels["defense"] == METHOD}
    assert described == {64}
    short = [entry.task.config for entry in entries(PROFILES["cpu"], [PAPER])
             if entry.item == "main" and entry.labels["defense"] == METHOD]
    assert {config.p for config in short} == {16} and {config.images for config in short} == {256, 32}
    assert departure(PAPER, PROFILES["paper"]) == ""


def test_everyone_has_the_same_clean_data_but_where_the_released_settings_differ() -> None:
    found = entries(PROFILES["paper"], [PAPER])
    assert {entry.task.clean_fraction for entry in found if entry.item == "main"
            and entry.labels["defense"] != "Before"} == {0.10}
    five = {entry.labels["defense"]: entry.task.clean_fraction for entry in found if entry.item == "five-percent"
            and entry.labels["defense"] != "Before"}
    assert five.pop(METHOD) == 0.10 and set(five.values()) == {0.05} and set(BASELINES) <= set(five)


def test_the_released_noise_is_that_of_its_data_set() -> None:
    noise = {entry.item: entry.task.config.alpha for entry in entries(PROFILES["paper"], [PAPER])
             if (entry.labels.get("defense"), entry.labels.get("variant")) == (METHOD, "released")}
    assert (noise["main"], noise["cifar100"], noise["gtsrb"]) == (0.02, 0.03, 0.03)


def test_baselines_have_the_released_settings_of_their_data_set() -> None:
    found = [entry for entry in entries(PROFILES["paper"], [PAPER]) if entry.labels.get("attack") == "BadNets"]
    frozen = {entry.labels["variant"]: entry.task.config.last for entry in found
              if entry.item == "main" and entry.labels["defense"] == "FP"}
    assert frozen == {"described": False, "released": True}
    sharpness = {entry.item: (entry.task.config.rho, entry.task.config.recipe.epochs) for entry in found
                 if entry.labels.get("defense") == "FT-SAM"}
    assert sharpness["main"] == sharpness["cifar100"] == (2.0, 100) and sharpness["gtsrb"] == (2.0, 50)


def test_attacks_that_train_by_their_own_code_keep_the_first_rate() -> None:
    cosine = {entry.labels["attack"]: entry.task.victim.recipe.cosine for entry in entries(PROFILES["paper"], [PAPER])
              if entry.item == "main"}
    assert {attack for attack, found in cosine.items() if found is None} == {"WaNet", "Input-aware"}


def test_only_cifar_10_is_flipped() -> None:
    flipped = {entry.item: entry.task.victim.recipe.augment.flip for entry in entries(PROFILES["paper"], [PAPER])}
    assert flipped["main"] and not flipped["gtsrb"] and not flipped["cifar100"]
    epochs = {entry.item: entry.task.victim.recipe.epochs for entry in entries(PROFILES["paper"], [PAPER])}
    assert epochs["main"] == 100 and epochs["gtsrb"] == 50
