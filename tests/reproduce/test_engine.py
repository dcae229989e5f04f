"""What the engine expects of a task before it runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attacks import badnets, badnets_words, input_aware
from defenses import cube, fp, ft, mcr, rnp
from reproduce.cells import Cell, Victim
from reproduce.engine import FORWARD_RATE, OVERHEAD, chains, cost, expected, ready
from reproduce.finetuning import TextRecipe
from reproduce.store import Store
from reproduce.training import Recipe
from tests.synthetic import write_run

RECIPE = Recipe(epochs=10, rates=((0, 0.1),))
VICTIM = Victim("cifar10", "wrn-16-1", RECIPE, 0, "badnets", badnets.SETTINGS["nad", "described"])
FT = Cell(VICTIM, "ft", ft.SETTINGS["nad", "described"], 0.05)
FP = Cell(VICTIM, "fp", fp.SETTINGS["nad", "described"], 0.05)
TEXT = Victim("sst-2", "minilm-l6", TextRecipe(epochs=5, rate=1e-4, warmup=3, batch=32), 0, "badnets_words",
              badnets_words.SETTINGS["badacts", "released"])


def test_seconds_come_from_the_nearest_kind_of_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    next_victim = replace(VICTIM, seed=1)
    tasks = [VICTIM, FT, next_victim, replace(FT, victim=next_victim), FP, TEXT]

    def found() -> dict[str, float]:
        return {name: seconds - OVERHEAD for name, seconds in expected(tasks, store).items()}

    assert found()[VICTIM.name] == pytest.approx(cost(VICTIM) / FORWARD_RATE), "nothing to go by"
    write_run(store, VICTIM, 90, 99, seed=0)
    write_run(store, FT, 90, 9, seed=0, info={"judging_seconds": 2.0})
    seconds = found()
    assert seconds[next_victim.name] == pytest.approx(1.0), "as the same attack's victim took"
    assert seconds[tasks[3].name] == pytest.approx(3.0), "as the same defense took, with its judging"
    assert seconds[FP.name] == pytest.approx(3.0 * cost(FP) / cost(FT)), "at the pace of the other cells"
    assert seconds[TEXT.name] == pytest.approx(4.0 * cost(TEXT) / (cost(VICTIM) + cost(FT))), "at that of all runs"


def test_what_trains_a_network_of_its_own_is_expected_to_take_longer() -> None:
    attacked = replace(VICTIM, attack="input_aware", settings=input_aware.SETTINGS["mcldef", "described"])
    assert cost(attacked) > 5 * cost(VICTIM), "its mask network learns for 25 epochs before it"
    retrained = Cell(TEXT, "cube", cube.SETTINGS["badacts", "released"], 1.0)
    assert cost(retrained) > 0.9 * cost(TEXT), "it trains the victim anew"


def test_what_sees_few_of_the_clean_images_is_not_expected_to_see_them_all() -> None:
    def of(defense: str, config: Any, fraction: float = 0.05) -> float:
        return cost(Cell(VICTIM, defense, config, fraction))

    few, whole = rnp.SETTINGS["rnp", "released"], mcr.SETTINGS["mcr", "released"]
    assert of("rnp", few) == of("rnp", few, 0.2) < 0.5 * of("rnp", replace(few, subset=2500))
    assert of("mcr", whole) > 3 * of("mcr", mcr.SETTINGS["nad", "described"])


def test_what_much_waits_for_comes_first() -> None:
    alone = replace(VICTIM, recipe=replace(RECIPE, epochs=12))
    much = replace(FT, config=ft.Config(replace(RECIPE, epochs=400)))
    assert cost(VICTIM) < cost(alone) < cost(much)
    tasks = [alone, VICTIM, FT, much]
    ahead = chains(tasks)
    assert ahead[VICTIM.name] == cost(VICTIM) + cost(much), "of the two that wait for it the longer one"
    assert ahead[alone.name] == cost(alone) and ahead[FT.name] == cost(FT)
    assert ready({task.name: task for task in tasks}, {}, set(), ahead) == [VICTIM.name, alone.name]
    assert ready({task.name: task for task in tasks}, {}, {alone.name}, ahead) == [alone.name, VICTIM.name]
