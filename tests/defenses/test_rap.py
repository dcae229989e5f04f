"""RAP: the trained embedding and the changes of probability against the official code, and what its faults do."""

from dataclasses import replace

import pytest
import torch

from defenses import rap
from reproduce.data.texts import Texts
from reproduce.defending import halves
from reproduce.errors import UserError
from reproduce.models.encoder import TextClassifier, hashed_words
from tests.defenses.text_formulas import bag_of_words, sentences
from tests.defenses.text_victim import TARGET, share, text_victim

RELEASED = rap.SETTINGS["badacts", "released"]
CORRECTED = rap.SETTINGS["badacts", "corrected"]
# clearloveclearlove/BadActs@7932f19, openbackdoor/defenders/rap_defender.py:114-193 (construct, rap_prob) on
# sentences(40) and bag_of_words(), with lr 0.5: p(x) - p(word + x) of the first eight sentences before and after, the
# trained embedding, and how many sentences of 40 are of the target class, with the 5th percentile of their changes.
RATE = 0.5
OFFICIAL_BEFORE = [-0.00608, -0.056953, -0.00198, -0.559127, -0.432393, -0.035931, -0.208828, -0.193622]
OFFICIAL_EMBEDDING = [0.517458, 0.567896, -0.028958, -0.737827, -0.97008, -0.416182]
OFFICIAL_AFTER = [0.277527, 0.569613, 0.095057, 0.214586, 0.35543, 0.276531, 0.04857, 0.736518]
OFFICIAL_OF_TARGET, OFFICIAL_PERCENTILE = 30, 0.014187


def texts_of(count: int) -> Texts:
    return Texts(sentences(count), torch.arange(count) % 2)


def falls(model: torch.nn.Module, texts: tuple[str, ...]) -> torch.Tensor:
    plain, after = (model.logits(one).softmax(1)[:, 1] for one in (texts, rap.perturbed(texts, "mb")))
    return plain - after


def test_the_embedding_is_that_of_the_official_code() -> None:
    model, texts = bag_of_words(), texts_of(40)
    assert rap.word_numbers(model, "mb") == hashed_words(["mb"], 8)[0][1:2]
    torch.testing.assert_close(falls(model, texts.texts)[:8], torch.tensor(OFFICIAL_BEFORE), atol=2e-4, rtol=0)
    changed = rap.construct(model, texts, replace(RELEASED, rate=RATE))
    number = rap.word_numbers(model, "mb")
    embedding = changed.network.embedding.weight[number][0]
    torch.testing.assert_close(embedding, torch.tensor(OFFICIAL_EMBEDDING), atol=5e-4, rtol=0)
    after = falls(changed, texts.texts)
    torch.testing.assert_close(after[:8], torch.tensor(OFFICIAL_AFTER), atol=1e-3, rtol=0)
    of_target = after[model.logits(texts.texts).argmax(1) == 1]
    assert len(of_target) == OFFICIAL_OF_TARGET
    assert float(of_target.quantile(0.05)) == pytest.approx(OFFICIAL_PERCENTILE, abs=1e-3)


def test_only_the_word_changes_and_its_norm_stays() -> None:
    model = bag_of_words()
    before = model.network.embedding.weight.clone()
    for config in (RELEASED, CORRECTED):
        changed = rap.construct(model, texts_of(40), replace(config, rate=RATE))
        after = changed.network.embedding.weight
        rows = (after != before).any(1).nonzero().flatten().tolist()
        assert rows == rap.word_numbers(model, "mb")
        assert after[rows].norm().item() == pytest.approx(before[rows].norm().item(), rel=1e-5)
        assert torch.equal(changed.network.head.weight, model.network.head.weight)
    assert torch.equal(model.network.embedding.weight, before)


def test_gradients_add_up_in_the_released_code_only() -> None:
    model, texts = bag_of_words(), texts_of(16)     # one batch an epoch
    number = rap.word_numbers(model, "mb")
    start = model.network.embedding.weight[number].clone()

    def trained(config: rap.Config, epochs: int) -> torch.Tensor:
        changed = rap.construct(model, texts, replace(config, epochs=epochs, rate=0.1))
        return changed.network.embedding.weight[number].detach()

    assert torch.equal(trained(RELEASED, 1), trained(CORRECTED, 1))
    assert (trained(RELEASED, 3) - start).norm() > 1.5 * (trained(CORRECTED, 3) - start).norm()


def test_loss_by_hand() -> None:
    delta = torch.tensor([0.0, -0.2, -0.5, -0.1])
    assert float(rap.rap_loss(delta, RELEASED)) == pytest.approx((0.1 + 0.2) / 4)
    assert float(rap.rap_loss(delta, replace(RELEASED, scale=3.0))) == pytest.approx((0.3 + 0.2) / 4)


@pytest.mark.parametrize("config", [RELEASED, CORRECTED])
def test_guard(config: rap.Config) -> None:
    model = bag_of_words()
    clean, texts = texts_of(120), sentences(160)[120:]
    rows: list[dict[str, float]] = []
    guard = rap.defend(model, clean, replace(config, rate=RATE), 0, lambda *args: rows.append(args[-1]))
    found = guard.judge(texts)
    plain = model.logits(texts).argmax(1)
    above = found.suspicion > guard.threshold
    allowed = plain == TARGET if config.protected_only else torch.ones_like(above)
    assert torch.equal(found.flagged, above & allowed)
    assert torch.equal(found.labels, torch.where(found.flagged, -1, plain))
    # Sentences of the target class lose probability; those of the other have little to lose, which looks poisoned.
    assert found.suspicion[plain == TARGET].mean() < found.suspicion[plain != TARGET].mean()
    assert above[plain != TARGET].any() and found.flagged[plain != TARGET].any() != config.protected_only
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5] and rows[4]["loss"] < rows[0]["loss"]
    assert torch.equal(guard.held_out, guard.judge(clean.texts).suspicion[_held(model, clean)])
    assert 0.03 < share(guard.held_out > guard.threshold, 1) < 0.09     # few sentences, between two of which it lies


def _held(model: TextClassifier, clean: Texts) -> torch.Tensor:
    """Rows of the half on which the threshold is chosen, in its order, that are predicted as the target."""
    rows = Texts(clean.texts, torch.arange(len(clean)))
    held = halves(rows, 0, "rap-halves")[1].labels
    return held[(model.logits(clean.texts).argmax(1) == TARGET)[held]]


def test_the_same_seed_is_the_same_guard_and_the_victim_is_untouched() -> None:
    victim = text_victim()
    before = victim.weights()
    found = [rap.defend(victim.model, victim.data.validation, RELEASED, seed).judge(victim.triggered).suspicion
             for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert victim.untouched(before)


def test_without_clean_sentences_of_the_target_class_nothing_is_flagged() -> None:
    victim = text_victim()
    rest = victim.data.validation.take((victim.data.validation.labels != TARGET).nonzero().flatten()[:20])
    guard = rap.defend(victim.model, rest, RELEASED, 0)
    assert len(guard.held_out) == 0 and not guard.judge(victim.triggered).flagged.any()


def test_bad_settings_are_one_line() -> None:
    victim = text_victim()
    with pytest.raises(UserError, match="class 5"):
        rap.defend(victim.model, victim.data.validation, replace(RELEASED, target=5), 0)
    with pytest.raises(UserError, match="take another"):
        rap.defend(victim.model, victim.data.validation, replace(RELEASED, word=" "), 0)
