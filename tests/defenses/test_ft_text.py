"""Plain fine-tuning of a text classifier."""

from dataclasses import replace

import pytest
import torch

from defenses import ft_text
from reproduce.defending import halves
from reproduce.errors import UserError
from reproduce.training import Observer
from tests.defenses.text_victim import TARGET, share, text_victim

OURS = ft_text.SETTINGS["badacts", "ours"]
# The small victim is trained at this rate.
FASTER = replace(OURS, recipe=replace(OURS.recipe, rate=2e-3, epochs=2))


def observer(rows: list[dict[str, float]]) -> Observer:
    return lambda phase, epoch, epochs, model, row: rows.append(row)


def test_the_rate_falls_from_the_start() -> None:
    assert OURS.recipe.rate_at(0, 10) == 2e-5
    assert OURS.recipe.rate_at(25, 10) == pytest.approx(1e-5)
    assert OURS.recipe.epochs == 5 and OURS.recipe.keep_best


def test_a_copy_is_trained_and_chosen_on_the_held_out_share() -> None:
    victim = text_victim()
    before = victim.weights()
    rows: list[dict[str, float]] = []
    guard = ft_text.defend(victim.model, victim.data.validation, FASTER, 0, observer(rows))
    assert guard.model is not None and guard.model is not victim.model
    assert not torch.equal(guard.model.network.classifier.weight, victim.model.network.classifier.weight)
    held, _ = halves(victim.data.validation, 0, "ft-text-held", 0.2)
    assert len(held) == 48 and len(rows) == 2
    reached = 100 * share(guard.model.logits(held.texts).argmax(1), held.labels)
    assert guard.info["validation_acc"] == pytest.approx(reached, abs=1e-4)
    assert guard.info["validation_acc"] == max(row["validation_acc"] for row in rows)
    found = guard.judge(victim.data.test.texts)
    assert share(found.labels, victim.data.test.labels) > 0.95 and found.suspicion is None
    assert victim.untouched(before)


def test_clean_data_alone_leave_the_backdoor_in_force() -> None:
    """What the baseline is there to show: nothing in clean sentences speaks against the trigger word."""
    victim = text_victim()
    guard = ft_text.defend(victim.model, victim.data.validation, FASTER, 0)
    assert share(guard.judge(victim.triggered).labels, TARGET) > 0.5    # 1.0 when written


def test_the_same_seed_is_the_same_model() -> None:
    victim = text_victim()
    logits = [ft_text.defend(victim.model, victim.data.validation, FASTER, seed).model.logits(victim.triggered)
              for seed in (0, 0, 1)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_a_defense_before_it_may_have_frozen_the_victim() -> None:
    victim = text_victim()
    victim.model.requires_grad_(False)
    try:
        guard = ft_text.defend(victim.model, victim.data.validation, FASTER, 0)
        assert not torch.equal(guard.model.network.classifier.weight, victim.model.network.classifier.weight)
    finally:
        victim.model.requires_grad_(True)


def test_too_few_sentences_are_one_line() -> None:
    victim = text_victim()
    with pytest.raises(UserError, match="take more"):
        ft_text.defend(victim.model, victim.data.validation.take(range(4)), OURS, 0)
