"""DAN: distances and scores against the official code and the definition, and what it does."""

import pytest
import torch

from defenses import dan
from reproduce.errors import UserError
from tests.defenses.text_victim import auroc, share, text_victim
from tests.defenses.tiny import wave

RELEASED = dan.SETTINGS["badacts", "released"]
# clearloveclearlove/BadActs@7932f19, openbackdoor/defenders/dan_defender.py:92-120, 214-265 (sample_estimator,
# get_distance_score) on features wave((60, 2, 5), 0.37) of classes i % 3, the first 48 for fitting and 12 held out,
# and on 1.5 wave((7, 2, 5), 0.53): distances by layer, normalised means, threshold.
OFFICIAL_DISTANCES = [[6.607057, 7.745098, 6.93375, 6.60918, 7.644196, 7.229502, 6.490153],
                      [7.364088, 7.27317, 6.708691, 7.004633, 7.557081, 6.786584, 6.983419]]
OFFICIAL_SCORES = [87.737915, 97.706924, 85.611084, 84.908371, 99.009781, 89.006592, 83.622177]
OFFICIAL_THRESHOLD = 0.858


def test_distances_and_scores_are_those_of_the_official_code() -> None:
    features, labels = wave((60, 2, 5), 0.37), torch.arange(60) % 3
    means, precisions = dan.statistics(features[:48], labels[:48], RELEASED.shrinkage)
    found = dan.mahalanobis(1.5 * wave((7, 2, 5), 0.53), means, precisions)
    torch.testing.assert_close(found.T, torch.tensor(OFFICIAL_DISTANCES).double(), rtol=1e-4, atol=0)
    held = dan.mahalanobis(features[48:], means, precisions)
    normal = dan.Normal(held)
    torch.testing.assert_close(normal.score(found), torch.tensor(OFFICIAL_SCORES), rtol=1e-3, atol=0)
    assert float(normal.score(held).quantile(1 - RELEASED.frr)) == pytest.approx(OFFICIAL_THRESHOLD, abs=1e-3)


def test_distances_by_hand() -> None:
    """One layer, two units, two classes: the covariance of the deviations is diag(1, 4)."""
    features = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, -2.0], [-1.0, 2.0]]).repeat(2, 1)
    features[4:] += 10
    labels = torch.tensor([0, 0, 0, 0, 5, 5, 5, 5])     # a class of no sentence is no obstacle
    means, precisions = dan.statistics(features[:, None], labels, 0.1)
    shrunk = torch.tensor([0.9 * 1 + 0.1 * 2.5, 0.9 * 4 + 0.1 * 2.5]).double()
    torch.testing.assert_close(precisions[0], torch.diag(1 / shrunk), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(means[0], torch.tensor([[0.0, 0.0], [10.0, 10.0]]).double())
    found = dan.mahalanobis(torch.tensor([[[1.0, 1.0]], [[10.0, 12.0]]]), means, precisions)
    torch.testing.assert_close(found[:, 0], torch.stack([(1 / shrunk).sum(), 4 / shrunk[1]]), rtol=1e-6, atol=0)


def test_features_are_means_over_the_tokens_of_each_sentence() -> None:
    victim = text_victim()
    texts = ["the film is warm .", "the second half drags on and on , though the camera work is not bad at all ."]
    found = dan.token_means(victim.model, texts)
    for text, wanted in zip(texts, found, strict=True):
        with torch.no_grad():
            states = victim.model.network(*victim.model.batch(victim.model.encode([text])), output_hidden_states=True)
        alone = torch.stack([layer[0].mean(0) for layer in states.hidden_states[1:]])
        torch.testing.assert_close(wanted, alone, rtol=1e-4, atol=1e-5)


def test_guard() -> None:
    victim = text_victim()
    before = victim.weights()
    guards = [dan.defend(victim.model, victim.data.validation, RELEASED, seed) for seed in (0, 0, 1)]
    clean, poisoned = (guards[0].judge(texts) for texts in (victim.data.test.texts, victim.triggered))
    assert len(guards[0].held_out) == int(0.2 * len(victim.data.validation))
    assert guards[0].held_out.mean().abs() < 1e-5
    assert 0.02 < share(guards[0].held_out > guards[0].threshold, 1) < 0.09
    assert share(clean.flagged, 1) < 0.2
    assert auroc(clean, poisoned) > 0.5     # 0.63 when written
    plain = victim.model.logits(victim.triggered).argmax(1)
    assert torch.equal(poisoned.labels, torch.where(poisoned.suspicion > guards[0].threshold, -1, plain))
    nonsense = guards[0].judge(["zz qq xx yy vv ww kk jj"] * 2)
    assert nonsense.suspicion.min() > clean.suspicion.median()
    assert torch.equal(guards[1].judge(victim.triggered).suspicion, poisoned.suspicion)
    assert not torch.equal(guards[2].judge(victim.triggered).suspicion, poisoned.suspicion)
    assert victim.untouched(before)


def test_too_few_sentences_are_one_line() -> None:
    victim = text_victim()
    with pytest.raises(UserError, match="at least 10"):
        dan.defend(victim.model, victim.data.validation.take(range(9)), RELEASED, 0)
