"""Identities, dependencies and protocols."""

from dataclasses import dataclass, field, replace

import pytest

from attacks import badnets, cl, input_aware, refool
from defenses import anp, ft
from reproduce.cells import Cell, Published, Victim, plain, with_dependencies
from reproduce.errors import UserError
from reproduce.protocols import PROFILES, entries, shorten
from reproduce.training import Recipe

RECIPE = Recipe(epochs=10, rates=((0, 0.1), (5, 0.01)))
VICTIM = Victim("digits", "wrn-10-1", RECIPE, 0, "badnets", badnets.Config())
CELL = Cell(VICTIM, "ft", ft.Config(), 0.05)


@pytest.mark.parametrize("other", [
    replace(VICTIM, seed=1), replace(VICTIM, dataset="cifar10"), replace(VICTIM, model="wrn-16-1"),
    replace(VICTIM, settings=badnets.Config(target=1)), replace(VICTIM, recipe=replace(RECIPE, weight_decay=0.0)),
    replace(VICTIM, recipe=replace(RECIPE, precision="bf16")), VICTIM.clean(),
    replace(VICTIM, published=Published("f", "0" * 64, "s")),
])
def test_every_part_of_the_configuration_is_in_the_identity(other: Victim) -> None:
    assert other.name != VICTIM.name
    assert replace(CELL, victim=other).name != CELL.name


def test_what_does_not_change_the_result_is_not_in_the_identity() -> None:
    assert replace(VICTIM, recipe=replace(RECIPE, graph=True)).name == VICTIM.name
    published = replace(VICTIM, published=Published("here", "0" * 64, "s"))
    assert replace(published, published=Published("there", "0" * 64, "t")).name == published.name


def test_names_are_stable_across_versions() -> None:
    # A changed name orphans every run people have: change it on purpose only.
    assert VICTIM.name == "victim-badnets-s0-f86cb3aa251a"
    assert CELL.name == "ft-badnets-s0-1f5ec1c8c9c7"


def test_a_later_field_counts_only_where_it_is_not_at_its_default() -> None:
    @dataclass(frozen=True)
    class Settings:
        old: int = 1
        new: tuple[int, ...] = field(default=(2,), metadata={"since": "a later paper"})

    assert plain(Settings()) == plain(Settings(new=(2,))) == {"old": 1}
    assert plain(Settings(new=(3,))) == {"old": 1, "new": [3]}


@pytest.mark.parametrize(("attack", "settings", "name"), [
    ("cl", cl.Config(), "victim-cl-s0-88704cd0e637"), ("refool", refool.Config(), "victim-refool-s0-dde20acbd0f9"),
])
def test_names_from_before_a_later_field_are_kept(attack: str, settings: object, name: str) -> None:
    assert replace(VICTIM, attack=attack, settings=settings).name == name


def test_dependencies_come_first_and_once() -> None:
    with_pgd = replace(VICTIM, attack="cl", settings=cl.Config())
    cells = [Cell(with_pgd, "ft", ft.Config(), fraction) for fraction in (0.05, 0.1)]
    assert with_dependencies(cells) == [VICTIM.clean(), with_pgd, *cells]


@pytest.mark.parametrize("name", PROFILES)
def test_protocols_list_each_run_once_per_place(name: str) -> None:
    listed = entries(PROFILES[name], ["nad"])
    places = [(entry.item, *sorted(entry.labels.items()), entry.task.seed) for entry in listed]
    assert len(places) == len(set(places))
    assert {entry.task.seed for entry in listed} == set(PROFILES[name].seeds)
    names = {task.name for task in with_dependencies([entry.task for entry in listed])}
    assert len(names) < len(listed)  # shared runs are shared


def test_beta_zero_is_beside_every_nad_row_of_the_comparisons() -> None:
    for item in ("main", "main-released", "clean-fraction", "augmentation", "curves"):
        rows = [entry.labels for entry in entries(PROFILES["paper"], ["nad"], [item])]
        nads = [labels for labels in rows if labels["defense"] == "NAD"]
        assert nads
        assert all({**labels, "defense": "NAD (beta = 0)"} in rows for labels in nads)


def test_items_on_request_are_left_out_unless_named() -> None:
    assert not [e for e in entries(PROFILES["paper"], ["nad"]) if e.item == "authors-victim"]
    assert entries(PROFILES["paper"], ["nad"], ["authors-victim"])
    with pytest.raises(UserError, match="choose from main"):
        entries(PROFILES["paper"], ["nad"], ["nonsense"])


def test_one_cell_of_a_table_is_asked_for_by_its_names() -> None:
    one = entries(replace(PROFILES["paper"], seeds=(0,)), ["nad"], ["main"], ["badnets"], ["nad"])
    assert [(entry.labels["attack"], entry.labels["defense"]) for entry in one] == [
        ("BadNets", "Before"), ("BadNets", "NAD"), ("BadNets", "NAD")], "described and released"
    every = entries(PROFILES["quick"], ["nad", "fmp"], defenses=["FMP"])
    assert {entry.paper for entry in every} == {"fmp"}, "no victims of a paper that does not have the defense"
    assert {entry.labels["defense"] for entry in every} == {"Before", "FMP"}
    assert {entry.labels["attack"] for entry in entries(PROFILES["quick"], ["cross"], attacks=["none"])} == {"none"}
    with pytest.raises(UserError, match="unknown attack wanet: choose from BadNets; Trojan; Blend"):
        entries(PROFILES["paper"], ["nad"], attacks=["BadNets", "wanet"])
    with pytest.raises(UserError, match="unknown defense ARGD: choose from FT; FP; "):
        entries(PROFILES["paper"], ["nad"], defenses=["ARGD"])


@pytest.mark.parametrize(("name", "iterations", "masks"), [("quick", 5, 2), ("cpu", 500, 3), ("paper", 2000, 25)])
def test_a_shorter_scale_cuts_more_than_epochs(name: str, iterations: int, masks: int) -> None:
    profile = PROFILES[name]
    assert profile.defense(anp.SETTINGS["mcldef", "described"]).iterations == iterations
    assert profile.attack(input_aware.SETTINGS["mcldef", "described"]).mask_epochs == masks
    assert [seed for seed in profile.seeds if profile.sweeps(seed)] == list(
        profile.seeds if name == "paper" else profile.seeds[:1])


@pytest.mark.parametrize("name", PROFILES)
def test_a_cut_leaves_the_values_of_a_factor_apart(name: str) -> None:
    tuned = [entry for entry in entries(PROFILES[name], ["fmp"]) if entry.item == "tuning"]
    assert all(entry.labels["tuning"] == str(entry.task.config.recipe.epochs) for entry in tuned)
    assert len({entry.task.name for entry in tuned}) == len(tuned) >= 2
    varied = [entry for entry in entries(PROFILES[name], ["fmp"]) if entry.item == "images"]
    assert len({entry.task.name for entry in varied}) == len(varied) > 1


def test_a_shortened_recipe_keeps_the_shape_of_its_schedule() -> None:
    assert shorten(RECIPE, 4).rates == ((0, 0.1), (2, 0.01)) and shorten(RECIPE, 4).epochs == 4
    assert shorten(RECIPE, 20) is RECIPE and shorten(RECIPE, None) is RECIPE
    # Steps that fall together leave the last one in force.
    assert shorten(Recipe(epochs=10, rates=((0, 1.0), (1, 0.5), (2, 0.1))), 2).rates == ((0, 0.1),)
