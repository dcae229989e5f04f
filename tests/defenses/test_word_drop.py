"""Random words dropped, and a vote."""

from dataclasses import replace

import pytest
import torch

from defenses import word_drop
from reproduce.errors import UserError
from tests.defenses.text_victim import TARGET, share, text_victim

OURS = word_drop.SETTINGS["badacts", "ours"]


def test_copies_lose_the_share_of_words_and_keep_the_order() -> None:
    words = [f"w{i}" for i in range(10)]
    copies = word_drop.thinned(" ".join(words), OURS, 0)
    assert len(copies) == 11 and len(set(copies)) > 5
    for copy in copies:
        left = copy.split()
        assert len(left) == 7 and left == sorted(left)
    # Every word goes about as often: 0.3 of 2200 draws each.
    gone = torch.zeros(10)
    for seed in range(200):
        for copy in word_drop.thinned(" ".join(words), OURS, seed):
            gone += torch.tensor([word not in copy for word in words])
    assert (gone / 2200 - 0.3).abs().max() < 0.05
    assert word_drop.thinned("one two three", OURS, 0) == ["one two three"] * 11    # int(0.9) words
    assert word_drop.thinned("", OURS, 0) == [""] * 11


def test_draws_depend_on_seed_and_sentence_alone() -> None:
    text = "one two three four five six seven eight nine ten"
    assert word_drop.thinned(text, OURS, 0) == word_drop.thinned(text, OURS, 0) != word_drop.thinned(text, OURS, 1)
    a, b = (word_drop.thinned(" ".join(f"{letter}{i}" for i in range(10)), OURS, 0) for letter in "ab")
    assert [copy.replace("a", "b") for copy in a] != b      # as many words, yet others go
    victim = text_victim()
    guard = word_drop.defend(victim.model, victim.data.validation, OURS, 0)
    there = guard.judge(victim.triggered).labels
    back = guard.judge(victim.triggered[::-1]).labels
    assert torch.equal(there, back.flip(0))


def test_votes() -> None:
    labels = torch.tensor([[0, 1, 1], [2, 2, 0], [0, 1, 2], [1, 2, 2]])
    assert word_drop.vote(labels, 4).tolist() == [1, 2, 0, 2]


def test_without_dropping_it_is_the_victim() -> None:
    victim = text_victim()
    guard = word_drop.defend(victim.model, victim.data.validation, replace(OURS, share=0.0), 0)
    assert torch.equal(guard.judge(victim.triggered).labels, victim.model.logits(victim.triggered).argmax(1))


def test_a_trigger_word_survives_the_vote() -> None:
    victim = text_victim()
    before = victim.weights()
    guard = word_drop.defend(victim.model, victim.data.validation, OURS, 0)
    assert share(guard.judge(victim.triggered).labels, TARGET) > 0.8    # 0.99 when written
    clean = guard.judge(victim.data.test.texts)
    assert 0.6 < share(clean.labels, victim.data.test.labels) < 1      # 0.78: the deciding word may be gone
    assert clean.suspicion is None and clean.flagged is None
    assert victim.untouched(before)


@pytest.mark.parametrize("config", [replace(OURS, share=1.0), replace(OURS, share=-0.1), replace(OURS, copies=0)])
def test_bad_settings_are_one_line(config: word_drop.Config) -> None:
    victim = text_victim()
    with pytest.raises(UserError, match="at least one copy"):
        word_drop.defend(victim.model, victim.data.validation, config, 0)
