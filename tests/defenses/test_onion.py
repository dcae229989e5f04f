"""ONION: its scores against the official code, the n-gram model against its definition, and what it does."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from defenses import onion
from reproduce.errors import UserError
from tests.defenses.text_formulas import checksums, sentences, tiny_gpt2
from tests.defenses.text_victim import TARGET, auroc, share, text_victim

PURIFY = onion.SETTINGS["badacts", "n-gram-purify"]
DETECT = onion.SETTINGS["badacts", "n-gram-detect"]
# clearloveclearlove/BadActs@7932f19, openbackdoor/defenders/onion_defender.py:113-207 (compute_score and
# get_processed_text) on sentences(12), with `checksums` in place of its language model.
OFFICIAL_SCORES = [-5.25, 5.125, 108.375, 20.25, 75.0, 115.0, 57.75, 93.25, 45.75, 75.0, 52.75, -9.5]
OFFICIAL_PURIFIED = ["a warm and", "honest that or", "", "or a film dull me", "that", "",
                     "that dull film feels cold", "", "a", "honest", "a", "feels to and never cold warm that"]
# The same with GPT2LM (:214-243) around tiny_gpt2(), and its perplexities of the twelve sentences as one batch.
OFFICIAL_PERPLEXITIES = [173.812241, 133.422821, 65.809219, 58.535561, 45.042767, 43.579399, 72.05159, 48.860146,
                         113.369438, 53.075642, 78.242966, 92.842125]
OFFICIAL_GPT2_SCORES = [-86.022217, 5.896656, 4.999352, 6.988876, 10.197826, -4.019951, 5.775955, -45.960495, 39.735779,
                        3.730247, 20.266842, -11.9771]
OFFICIAL_GPT2_PURIFIED = ["a warm and", "honest that feels", "me and that", "or a film me honest",
                          "warm and honest film that", "and film never dull cold me warm honest",
                          "to warm film feels cold a honest", "dull me honest", "to me", "warm honest that feels",
                          "cold honest never", "feels to and never cold warm that"]


def test_scores_and_purified_sentences_are_those_of_the_official_code() -> None:
    texts = sentences(12)
    drops = onion.one_by_one(checksums)
    assert onion.suspicion(texts, drops).tolist() == OFFICIAL_SCORES
    assert [onion.purified(text, drops, 0.0) for text in texts] == OFFICIAL_PURIFIED


def test_gpt2_with_padding_is_the_official_language_model() -> None:
    texts = sentences(12)
    perplexities = onion.causal_perplexities(*tiny_gpt2(), onion.SETTINGS["badacts", "gpt2-purify"])
    torch.testing.assert_close(perplexities(texts), torch.tensor(OFFICIAL_PERPLEXITIES), rtol=1e-4, atol=0)
    drops = onion.one_by_one(perplexities)
    torch.testing.assert_close(onion.suspicion(texts, drops), torch.tensor(OFFICIAL_GPT2_SCORES), rtol=1e-4, atol=1e-3)
    assert [onion.purified(text, drops, 0.0) for text in texts] == OFFICIAL_GPT2_PURIFIED


def test_masked_perplexities_do_not_depend_on_the_batch() -> None:
    texts = sentences(12)
    network, tokenizer = tiny_gpt2()
    config = onion.SETTINGS["badacts", "gpt2-purify-masked"]
    masked = onion.causal_perplexities(network, tokenizer, config)
    alone = torch.cat([masked([text]) for text in texts])
    torch.testing.assert_close(masked(texts), alone, rtol=1e-4, atol=0)
    padded = onion.causal_perplexities(network, tokenizer, replace(config, padding=True))
    assert not torch.allclose(padded(texts), alone, rtol=1e-2)
    assert masked(["warm"]).isnan().all()   # one token: there is nothing to predict


def test_a_drop_that_is_no_number_counts_as_none() -> None:
    def drops(words: list[str]) -> torch.Tensor:
        return torch.tensor([torch.nan, -2.0][:len(words)])

    assert onion.suspicion(["two words", "one", ""], drops).tolist() == [-2.0, 0.0, 0.0]
    assert onion.suspicion(["two words"], lambda words: torch.full((2,), torch.nan)).tolist() == [0.0]
    assert onion.purified("two words", drops, 0.0) == "two words"


def test_the_n_gram_model_is_a_distribution() -> None:
    texts = text_victim().data.validation.texts
    model = onion.Trigrams(texts, 0.75)
    for context in (("the", "film"), (onion.START, onion.START), ("never", "seen"), ("never-seen", "the")):
        seen = math.fsum(model.probability(*context, word) for word in model.singles)
        unknown = model.probability(*context, "a word of no sentence")
        assert math.isclose(seen + unknown, 1.0, rel_tol=1e-9)
        assert 0 < unknown < 0.1


def test_the_n_gram_model_by_hand() -> None:
    model = onion.Trigrams(["a b", "A c"], 0.5)
    # After <s> come a (once, as contexts are counted by kind); after a come b and c; after b and c the end.
    # Pairs: <s>a, ab, ac, b</s>, c</s>. So a, b, c are seen after one word each, the end after two: 5 in all.
    a, b, end = (0.5 / 5 + 0.5 * 4 / 5 / 5 + extra for extra in (0, 0, 1 / 5))
    a2 = (1 - 0.5 + 0.5 * a) / 1
    b2 = (1 - 0.5 + 0.5 * 2 * b) / 2
    assert math.isclose(model.probability(onion.START, onion.START, "a"), (2 - 0.5 + 0.5 * a2) / 2)
    assert math.isclose(model.probability(onion.START, "a", "b"), (1 - 0.5 + 0.5 * 2 * b2) / 2)
    assert math.isclose(model.probability("x", "a", "b"), b2)
    assert math.isclose(model.probability("x", "y", onion.END), end)
    assert math.isclose(model.probability("x", "y", "z"), 0.5 * 4 / 5 / 5)


def test_n_gram_drops_are_those_of_the_plain_computation() -> None:
    victim = text_victim()
    model = onion.Trigrams(victim.data.validation.texts, 0.75)
    plain = onion.one_by_one(model.perplexities)
    for text in (*victim.triggered[:20], "one", "Two words", "so so so so", "unheard of , cf cf"):
        words = text.split()
        torch.testing.assert_close(model.drops(words), plain(words), rtol=1e-9, atol=1e-9)


def test_purification_removes_the_trigger_word() -> None:
    victim = text_victim()
    before = victim.weights()
    guard = onion.defend(victim.model, victim.data.validation, PURIFY, 0)
    undefended = share(victim.model.logits(victim.triggered).argmax(1), TARGET)
    defended = guard.judge(victim.triggered)
    assert defended.suspicion is None and undefended > 0.8     # 0.875
    assert share(defended.labels, TARGET) < 0.3     # 0.13 when written
    assert share(guard.judge(victim.data.test.texts).labels, victim.data.test.labels) > 0.7     # 0.80
    assert victim.untouched(before)


def test_detection_finds_the_triggered_sentences_and_keeps_its_promise_on_clean_ones() -> None:
    victim = text_victim()
    guards = [onion.defend(victim.model, victim.data.validation, DETECT, seed) for seed in (0, 0, 1)]
    clean, poisoned = guards[0].judge(victim.data.test.texts), guards[0].judge(victim.triggered)
    assert auroc(clean, poisoned) > 0.85    # 0.95
    assert share(clean.flagged, 1) < 0.15
    assert (poisoned.labels[poisoned.flagged] == -1).all()
    assert len(guards[0].held_out) == len(victim.data.validation) // 2
    assert share(guards[0].held_out > guards[0].threshold, 1) <= 0.05
    assert torch.equal(guards[1].judge(victim.triggered).suspicion, poisoned.suspicion)
    assert guards[2].threshold != guards[0].threshold


def test_detection_by_a_given_language_model_uses_all_clean_sentences() -> None:
    victim = text_victim()
    few = victim.data.validation.take(range(20))
    guard = onion.defend(victim.model, few, onion.SETTINGS["badacts", "gpt2-detect"], 0, perplexities=checksums)
    assert torch.equal(guard.held_out, onion.suspicion(few.texts, onion.one_by_one(checksums)))


def test_a_local_folder_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, tokenizer = tiny_gpt2()
    network.save_pretrained(tmp_path / "models" / "gpt2")
    tokenizer.save_pretrained(tmp_path / "models" / "gpt2")
    monkeypatch.setenv("BACKDOOR_DATA", str(tmp_path))
    config = onion.SETTINGS["badacts", "gpt2-purify"]
    found = onion.load(config, torch.device("cpu"))(sentences(12))
    torch.testing.assert_close(found, onion.causal_perplexities(network, tokenizer, config)(sentences(12)))


@pytest.mark.parametrize("config", [replace(PURIFY, language_model="no/such/folder/of/a/model"),
                                    replace(PURIFY, mode="translate")])
def test_bad_settings_are_one_line(config: onion.Config) -> None:
    victim = text_victim()
    with pytest.raises(UserError, match=r"purify|n-gram") as caught:
        onion.defend(victim.model, victim.data.validation, config, 0)
    assert "\n" not in str(caught.value)
