"""Verdicts on runs made to fit them."""

import json
import re
import shutil
from pathlib import Path

import pytest

from reproduce import claims
from reproduce.claims import criteria
from reproduce.protocols import PROFILES, Entry
from reproduce.results import Results
from reproduce.statistics import wilcoxon
from reproduce.store import Store
from tables import argd as argd_tables
from tables import nad as nad_tables
from tables.layout import Pair, over_attacks
from tests.synthetic import ATTACKS, Stub, results, write_run


def made(root: Path, levels: dict[str, tuple[float, float]], seeds: int = 6, attacks: tuple[str, ...] = ATTACKS,
         paper: str = "nad") -> Results:
    """Main-table runs at exactly these (ACC, ASR) levels plus a little noise, described settings."""
    store, entries = Store(root), []
    for seed in range(seeds):
        for number, attack in enumerate(attacks):
            for place, (defense, (acc, asr)) in enumerate(levels.items()):
                labels = {"attack": attack, "defense": defense, "variant": "-" if defense == "Before" else "described"}
                task = Stub(f"{attack}-{defense}".replace(" ", ""), seed)
                entries.append(Entry(paper, "main", labels, task))
                write_run(store, task, acc, asr, 1000 * seed + 10 * number + place, with_pictures=False)
    return Results(store, entries)


def verdict(results_: Results, name: str, profile: str = "paper") -> str:
    return next(claim.verdict for claim in claims.claims(results_, PROFILES[profile]) if claim.name == name)


GOOD = {"Before": (90, 99), "NAD (beta = 0)": (89, 40), "NAD": (89, 4)}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return made(tmp_path_factory.mktemp("good"), GOOD)


def test_erased_without_loss_and_by_distillation(good: Results) -> None:
    assert verdict(good, "erases-six-attacks-described") == criteria.SUPPORTED
    assert verdict(good, "no-obvious-loss-described") == criteria.SUPPORTED
    assert verdict(good, "distillation-adds-described") == criteria.SUPPORTED
    assert verdict(good, "erases-six-attacks-released") == criteria.NOT_RUN
    named = {claim.name for claim in claims.claims(good, PROFILES["paper"])}
    assert len(named) == 6 and "augmentation-makes-erasure-harder" not in named, "no claim about what was not asked for"


def test_not_erased_with_loss_and_no_gain(tmp_path: Path) -> None:
    found = made(tmp_path, {"Before": (90, 99), "NAD (beta = 0)": (70, 59), "NAD": (70, 60)})
    assert verdict(found, "erases-six-attacks-described") == criteria.REFUTED
    assert verdict(found, "no-obvious-loss-described") == criteria.REFUTED
    assert verdict(found, "distillation-adds-described") != criteria.SUPPORTED


def test_the_same_erasure_without_distillation_refutes_the_control(tmp_path: Path) -> None:
    found = made(tmp_path, {"Before": (90, 99), "NAD (beta = 0)": (89, 1), "NAD": (89, 1)})
    assert verdict(found, "distillation-adds-described") == criteria.REFUTED


def test_a_comparison_of_asr_says_what_is_left_of_it_beyond_the_base_rates(tmp_path: Path) -> None:
    # The control calls a quarter of the images wrongly, some of them the target, with a trigger or without.
    found = made(tmp_path, {"Before": (90, 99), "NAD (beta = 0)": (75, 30), "NAD": (89, 5)})
    rows = criteria.defenses(found, nad_tables.STUDY, "described")
    one = criteria.compared(rows, "made", "NAD", "NAD (beta = 0)")
    gap = {name: (part.asr - part.base_rate).mean() for name, part in rows.items()}
    assert one.excess.mean == pytest.approx(gap["NAD"] - gap["NAD (beta = 0)"])
    assert one.excess.mean - one.interval.mean > 1
    assert f"; excess ASR {one.excess.mean:+.2f} [" in criteria.adds([one])[0].text
    assert criteria.compared(rows, "made", "NAD", "NAD (beta = 0)", "acc").excess is None
    erased = criteria.erases(rows, "NAD", ["BadNets"])[0].text
    excess = rows["NAD"].query("attack == 'BadNets'").excess.mean()
    assert f"], excess {excess:.1f} [" in erased


def against_control(*differences: float, controls: int = 1) -> criteria.Check:
    """The verdict on these differences of ASR, a seed each, in a family of so many alike."""
    paired = [Pair("BadNets", 50 + difference, 50, "", "") for difference in differences]
    one = criteria.Compared("made", "control", paired, over_attacks(paired, "asr"), wilcoxon(differences))
    return criteria.adds([one] * controls)[0]


def test_a_small_gain_for_certain_is_never_called_none() -> None:
    small = (-1.3, -1.2, -1.4, -1.25, -1.35, -1.31, -1.29)
    assert against_control(*small).outcome == criteria.SUPPORTED
    found = against_control(*small, controls=4)
    assert found.outcome == criteria.UNDECIDED and "p cannot fall below 0.0625 here" in found.text
    assert against_control(*small, -1.32, controls=4).outcome == criteria.SUPPORTED, "eight seeds can"
    assert against_control(0.3, -0.2, 0.1, -0.4, 0.2, 0.0, -0.1).outcome == criteria.REFUTED
    assert "1 of them equal" in against_control(0.3, -0.2, 0.1, -0.4, 0.2, 0.0, -0.1).text


def test_five_attacks_do_not_support_a_claim_about_six(tmp_path: Path) -> None:
    assert verdict(made(tmp_path, GOOD, attacks=ATTACKS[:5]), "erases-six-attacks-described") == criteria.UNDECIDED


def test_an_attack_that_did_not_take_is_not_erased(tmp_path: Path) -> None:
    found = made(tmp_path, {"Before": (90, 20), "NAD": (89, 2)})
    assert verdict(found, "erases-six-attacks-described") == criteria.UNDECIDED


def test_five_pairs_cannot_support_the_control(tmp_path: Path) -> None:
    found = made(tmp_path, GOOD, seeds=1, attacks=ATTACKS[:5])
    assert verdict(found, "distillation-adds-described") == criteria.UNDECIDED


def test_one_seed_neither_supports_nor_refutes(tmp_path: Path) -> None:
    names = ("erases-six-attacks-described", "no-obvious-loss-described")
    for seeds, far, near in ((1, criteria.UNDECIDED, criteria.UNDECIDED), (6, criteria.REFUTED, criteria.SUPPORTED)):
        good = made(tmp_path / f"good-{seeds}", GOOD, seeds)
        bad = made(tmp_path / f"bad-{seeds}", {"Before": (90, 99), "NAD": (60, 70)}, seeds)
        assert {verdict(good, name) for name in names} == {near}
        assert {verdict(bad, name) for name in names} == {far}


def compared_with_nad(root: Path, nad: float, argd: float, seeds: int = 6) -> criteria.Check:
    """The claim that ARGD leaves up to 94.85 % less ASR than NAD, on victims at these levels of ASR."""
    levels = {"Before": (90, 99), "NAD": (89, nad), "ARGD": (89, argd)}
    found = made(root, levels, seeds, paper="argd")
    return criteria.up_to(found, criteria.defenses(found, argd_tables.STUDY, "described"), "ARGD", "NAD", "asr", 94.85,
                          ATTACKS)


def test_a_largest_share_is_refuted_by_its_interval_and_not_by_its_value(tmp_path: Path) -> None:
    assert compared_with_nad(tmp_path / "far", 40, 38).outcome == criteria.REFUTED
    assert compared_with_nad(tmp_path / "one-seed", 40, 38, seeds=1).outcome == criteria.UNDECIDED
    near = compared_with_nad(tmp_path / "near", 30, 3)
    assert near.outcome == criteria.UNDECIDED and near.value < 94.85


def test_nothing_loses_more_than_all_of_its_asr(tmp_path: Path) -> None:
    check = compared_with_nad(tmp_path, 4, 0)
    low, high = (float(bound) for bound in re.search(r"less ASR \[([\d.]+), ([\d.]+)\]", check.text).groups())
    assert low < high <= 100 and check.low < check.value <= check.high <= 7


def test_a_share_is_of_the_same_seeds(tmp_path: Path) -> None:
    levels = {"Before": (90, 99), "NAD": (89, 60), "ARGD": (89, 30)}
    found = made(tmp_path, levels, paper="argd")
    for entry in found.entries:
        if entry.labels["defense"] == "ARGD" and entry.task.seed:
            shutil.rmtree(tmp_path / "runs" / entry.task.name)
        elif entry.labels["defense"] == "NAD" and entry.task.seed:
            write_run(found.store, entry.task, 89, 1, 7, with_pictures=False)
    share = criteria.up_to(found, criteria.defenses(found, argd_tables.STUDY, "described"), "ARGD", "NAD", "asr", 94.85,
                           ATTACKS)
    assert float(re.match(r"at most ([\d.]+) %", share.text)[1]) == pytest.approx(50, abs=15)


def test_a_victim_that_is_missing_is_not_an_attack_that_failed(tmp_path: Path) -> None:
    found = made(tmp_path, GOOD, seeds=1)
    shutil.rmtree(tmp_path / "runs" / "BadNets-Before-s0")
    claim = next(claim for claim in claims.claims(found, PROFILES["paper"])
                 if claim.name == "erases-six-attacks-described")
    assert [check.outcome for check in claim.checks if check.subject == "BadNets"] == [criteria.NOT_RUN]


def test_augmentation_counts_seeds_with_every_defense_only(tmp_path: Path) -> None:
    found = results(tmp_path, seeds=2)
    for entry in found.entries:
        if entry.item == "augmentation" and entry.labels["defense"] == "NAD" and entry.task.seed == 1 \
                and entry.labels["victim"].startswith("standard"):
            shutil.rmtree(tmp_path / "runs" / entry.task.name)
    claim = next(claim for claim in claims.claims(found, PROFILES["paper"])
                 if claim.name == "augmentation-makes-erasure-harder")
    assert claim.checks[0].n == 1 and not any(run.endswith("-s1") for run in claim.runs)


def test_smoke_scale_gives_no_verdict_and_shortened_protocol_says_so(good: Results) -> None:
    assert verdict(good, "erases-six-attacks-described", "quick") == claims.NO_VERDICT
    assert verdict(good, "erases-six-attacks-released", "quick") == criteria.NOT_RUN
    assert {claim.scale for claim in claims.claims(good, PROFILES["cpu"])} == {"shortened protocol"}


@pytest.mark.parametrize("outcomes, expected", [
    (["supported", "supported"], "supported"), (["supported", "not run"], "inconclusive"),
    (["not supported", "supported"], "not supported"), (["inconclusive", "supported"], "inconclusive"),
    (["not run", "not run"], "not run"),
])
def test_combine(outcomes: list[str], expected: str) -> None:
    assert criteria.combine([criteria.Check("", outcome, "") for outcome in outcomes]) == expected


def test_json_has_no_nan_and_names_the_runs(tmp_path: Path) -> None:
    found = claims.claims(results(tmp_path / "store", seeds=1), PROFILES["paper"])
    claims.write(found, tmp_path / "claims.json")
    loaded = json.loads((tmp_path / "claims.json").read_text(), parse_constant=pytest.fail)
    assert len(loaded) == 7
    augmentation = next(claim for claim in loaded if claim["name"].startswith("augmentation"))
    assert augmentation["outcome"] == "inconclusive", "one seed decides nothing"
    assert augmentation["checks"][0]["low"] is None and augmentation["runs"]
