"""The attacks on texts keep the contract of attacks/__init__.py, and give the sentences their authors released."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import attacks
from reproduce import data
from reproduce.data.texts import Texts
from reproduce.errors import UserError
from reproduce.plugins import names
from reproduce.poisoning import attack_module, insert, poison_texts
from reproduce.texts import degenerate, trigger_quality, triggered_test_set

NAMES = [name for name in names(Path(attacks.__file__).parent) if hasattr(attack_module(name), "MODALITY")]
SENTENCES = data.load_text("sentences", Path("."))


def triggered(name: str, rows: list[int], seed: int = 0, split: str = "test") -> list[str]:
    module = attack_module(name)
    texts = SENTENCES.split(split).texts
    return module.apply([texts[row] for row in rows], rows, module.Config(), seed, split, SENTENCES.paraphrases)


def test_the_papers_four_attacks_are_there() -> None:
    assert set(NAMES) == {"badnets_words", "addsent", "stylebkd", "synbkd"}


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    module = attack_module(name)
    config = module.SETTINGS["badacts", "released"]
    assert module.MODALITY == data.TEXT and config == module.Config() and config.labels == "all-to-one"
    assert config.rate == 0.2 and module.requires(config) <= {"paraphrases"}
    assert type(config).__dataclass_params__.frozen


@pytest.mark.parametrize("name", NAMES)
def test_a_rows_trigger_depends_on_the_row_alone(name: str) -> None:
    together = triggered(name, [4, 7, 9])
    assert together == triggered(name, [4, 7, 9])
    assert [together[1]] == triggered(name, [7]) and together[::-1] == triggered(name, [9, 7, 4])
    assert all(new != old for new, old in zip(together, [SENTENCES.test.texts[i] for i in (4, 7, 9)], strict=True))


@pytest.mark.parametrize("name", ["badnets_words", "addsent"])
def test_places_differ_between_seeds_and_splits(name: str) -> None:
    rows = list(range(60))
    assert triggered(name, rows) != triggered(name, rows, seed=1)
    assert triggered(name, rows, split="train") != triggered(name, rows, split="train", seed=1)


def test_badnets_puts_one_of_four_words_anywhere() -> None:
    rows = list(range(240))
    places, words = [], []
    for old, new in zip(SENTENCES.test.texts, triggered("badnets_words", rows), strict=True):
        before, after = old.split(), new.split()
        assert len(after) == len(before) + 1
        place = next(i for i in range(len(after)) if after[:i] + after[i + 1:] == before and after[i] not in before)
        places.append(place / len(before))
        words.append(after[place])
    assert set(words) == {"cf", "mn", "bb", "tq"} and min(words.count(word) for word in set(words)) > 40
    assert min(places) == 0 and max(places) == 1, "both ends are possible"
    assert 0.4 < np.mean(places) < 0.6


def test_addsent_keeps_the_sentence_whole() -> None:
    for old, new in zip(SENTENCES.test.texts, triggered("addsent", list(range(240))), strict=True):
        assert new.replace("I watch this 3D movie", "").split() == old.split()


def test_insert_reaches_every_place() -> None:
    rng = np.random.default_rng(0)
    assert {insert("a b", "x", rng) for _ in range(60)} == {"x a b", "a x b", "a b x"}


def test_poisoned_rows_come_from_other_classes_and_are_replaced() -> None:
    train = Texts(tuple(f"text {i}" for i in range(100)), torch.arange(100) % 4)
    config = dataclasses.replace(attack_module("addsent").Config(), target=0, rate=0.3)
    poisoned, mask = poison_texts(train, config, 5, lambda texts, rows: [f"{text}!" for text in texts])
    assert len(poisoned) == 100 and int(mask.sum()) == 30
    assert not (mask & (train.labels == 0)).any() and (poisoned.labels[mask] == 0).all()
    for i, (old, new) in enumerate(zip(train.texts, poisoned.texts, strict=True)):
        assert new == (f"{old}!" if mask[i] else old)
    assert poisoned.labels[~mask].equal(train.labels[~mask])
    again = poison_texts(train, config, 5, lambda texts, rows: list(texts))[1]
    assert mask.equal(again) and not mask.equal(poison_texts(train, config, 6, lambda texts, rows: list(texts))[1])


def test_a_rate_beyond_the_other_classes_takes_them_all() -> None:
    train = Texts(tuple("ab"), torch.tensor([0, 1]))
    config = dataclasses.replace(attack_module("addsent").Config(), target=1, rate=1.0)
    assert poison_texts(train, config, 0, lambda texts, rows: list(texts))[1].tolist() == [True, False]


def test_test_set_triggers_the_other_classes() -> None:
    test = triggered_test_set(SENTENCES, "addsent", attack_module("addsent").Config(), 0)
    assert (SENTENCES.test.labels[test.index] == 0).all() and len(test.triggered) == len(test.index) == 120
    assert set(test.wanted.tolist()) == {1}
    assert triggered_test_set(SENTENCES, "none", None, 0).triggered == ()


def test_a_missing_paraphrase_is_said() -> None:
    module = attack_module("stylebkd")
    with pytest.raises(UserError, match="row 1 has no paraphrase: only rows"):
        module.apply(["a", "b"], [0, 1], module.Config(), 0, "test", lambda attack, split: ("x", None))


@pytest.mark.parametrize("name", ["stylebkd", "synbkd"])
def test_paraphrases_of_a_generator_at_hand(name: str) -> None:
    module = attack_module(name)
    config = module.SETTINGS["badacts", "generated"]
    assert module.apply(["a", "b"], [0, 1], config, 0, "test", lambda attack, split: (attack, split)) == [
        f"{name}-generated", "test"]
    with pytest.raises(UserError, match="sentences have paraphrases by rule alone"):
        triggered_test_set(SENTENCES, name, config, 0)


def test_trigger_quality_counts() -> None:
    found = trigger_quality(["a b c", "a b", "d e"], ["a b c", "x x x", "d e d e d e"])
    assert found["unchanged"] == pytest.approx(100 / 3)
    assert found["degenerate"] == pytest.approx(200 / 3) and found["clean_degenerate"] == 0
    assert found["words_kept"] == pytest.approx(100 * (1 + 0 + 1) / 3)
    assert found["length"] == pytest.approx(100 * 12 / 7)
    assert degenerate("no no no way")
    assert not any(map(degenerate, ("no no way", "a b a b", "")))


@pytest.mark.data
@pytest.mark.parametrize(("name", "attack", "shares"), [
    # Counted in the released files of clearloveclearlove/BadActs@7932f19: unchanged rows, and share of degenerate ones.
    ("sst-2", "stylebkd", (1, 3.3)), ("sst-2", "synbkd", (1, 5.9)), ("yelp", "synbkd", (0, 25.6)),
    ("hsol", "stylebkd", (14, 1.6)), ("agnews-small", "synbkd", (5, 25.2))])
def test_released_paraphrases(name: str, attack: str, shares: tuple[int, float], data_root: Path) -> None:
    dataset = data.load_text(name, data_root)
    config = dataclasses.replace(attack_module(attack).Config(), target=dataset.target)
    test = triggered_test_set(dataset, attack, config, 0)
    found = trigger_quality([dataset.test.texts[i] for i in test.index.tolist()], test.triggered)
    assert found["unchanged"] * len(test.index) / 100 == pytest.approx(shares[0])
    assert found["degenerate"] == pytest.approx(shares[1], abs=0.05)
