"""STRIP for text: entropies and their averaging against the official code, and what the fault in it costs."""

from dataclasses import replace

import pytest
import torch

from defenses import strip
from reproduce.data.texts import Texts
from reproduce.errors import UserError
from tests.defenses.text_formulas import sentences
from tests.defenses.text_victim import auroc, share, text_victim
from tests.defenses.tiny import wave

RELEASED = strip.SETTINGS["badacts", "released"]
CORRECTED = strip.SETTINGS["badacts", "corrected"]
# clearloveclearlove/BadActs@7932f19, openbackdoor/defenders/strip_defender.py:120-139 (cal_entropy) for six sentences
# of which copy r of sentence i has the logits 6 wave((30, 3), 0.37)[5 i + r].
OFFICIAL_ENTROPIES = [1.170905, 1.080994, 0.709078, 1.121127, 0.910155, 0.815931]
# The same file, :102-107 (cal_tfidf) on sentences(12): the words of each that are no stop words, highest TF-IDF first.
OFFICIAL_WORDS = [["warm"], ["feels", "honest"], [], ["dull", "film", "honest"], ["film", "warm", "honest"],
                  ["cold", "dull", "film", "warm", "honest"],
                  ["cold", "dull", "feels", "film", "warm", "honest"], ["dull", "honest"], ["warm"],
                  ["feels", "warm", "honest"], ["cold", "feels", "film", "honest"], ["cold", "feels", "warm"]]


def probabilities() -> torch.Tensor:
    return (6 * wave((30, 3), 0.37)).softmax(1)


def test_released_averages_are_those_of_the_official_code() -> None:
    entropies = strip.entropy(probabilities())
    found = strip.averaged(entropies, RELEASED)
    torch.testing.assert_close(found, torch.tensor(OFFICIAL_ENTROPIES), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(strip.averaged(entropies, CORRECTED), found, atol=0.05)


def test_corrected_averages_are_over_the_copies_of_each_sentence() -> None:
    p = probabilities().double()
    plain = -(p * p.log2()).sum(1)
    wanted = torch.stack([plain[5 * i:5 * i + 5].mean() for i in range(6)]).float()
    torch.testing.assert_close(strip.averaged(strip.entropy(probabilities()), CORRECTED), wanted)
    assert strip.entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist() == [0.0, 1.0]


def test_mixing_destroys_what_separates() -> None:
    """Clean entropies 1, poisoned 0: the fault leaves one level for several kinds of sentences."""
    entropies = torch.cat([torch.ones(30 * 5), torch.zeros(20 * 5)])
    right, wrong = strip.averaged(entropies, CORRECTED), strip.averaged(entropies, RELEASED)
    assert right[:30].min() == 1 and right[30:].max() == 0
    assert wrong[:30].max() <= wrong[30:].max()     # every sentence of either kind has about 3 of 5 clean copies


def test_words_come_in_the_order_of_the_official_code() -> None:
    words = strip.Replacements(sentences(12))
    assert [words.of(row, len(wanted)) for row, wanted in enumerate(OFFICIAL_WORDS)] == OFFICIAL_WORDS
    assert words.words == ["cold", "dull", "feels", "film", "honest", "warm"]
    # Beyond a sentence's own words come the others by the alphabet, each once, and no more than there are.
    assert words.of(1, 4) == ["feels", "honest", "cold", "dull"]
    assert words.of(2, 9) == words.words


def test_copies_replace_at_most_the_share_and_depend_on_the_sentence_alone() -> None:
    words = strip.Replacements(text_victim().data.validation.texts)
    text = "one two three four five six seven"
    copies = strip.perturbed(text, words, RELEASED, 0)
    assert len(copies) == 5 and len(set(copies)) > 1
    for copy in copies:
        changed = [new for old, new in zip(text.split(), copy.split(), strict=True) if old != new]
        assert 1 <= len(changed) <= 3 and set(changed) <= set(words.words)
    assert strip.perturbed(text, words, RELEASED, 0) == copies != strip.perturbed(text, words, RELEASED, 1)
    assert strip.perturbed("", words, RELEASED, 0) == [""] * 5


def test_judging_together_or_apart() -> None:
    victim = text_victim()
    before = victim.weights()
    clean, triggered = victim.data.test.texts, victim.triggered
    for config, same in ((CORRECTED, True), (RELEASED, False)):
        guard = strip.defend(victim.model, victim.data.validation, config, 0)
        together = guard.judge([*clean, *triggered]).suspicion
        apart = torch.cat([guard.judge(clean).suspicion, guard.judge(triggered).suspicion])
        assert torch.allclose(together, apart, atol=1e-5) == same
        assert guard.held_out.max() <= 0
        assert share(guard.held_out > guard.threshold, 1) <= 0.05
    assert victim.untouched(before)


def test_it_finds_some_of_the_triggered_sentences() -> None:
    victim = text_victim()
    guards = [strip.defend(victim.model, victim.data.validation, CORRECTED, 0) for _ in range(2)]
    clean, poisoned = (guards[0].judge(texts) for texts in (victim.data.test.texts, victim.triggered))
    assert auroc(clean, poisoned) > 0.55    # 0.65 when written: here one word decides, as a trigger does
    assert torch.equal(poisoned.flagged, poisoned.suspicion > guards[0].threshold)
    assert torch.equal(guards[1].judge(victim.triggered).suspicion, poisoned.suspicion)


def test_bad_settings_are_one_line() -> None:
    victim = text_victim()
    with pytest.raises(UserError, match="per-sentence"):
        strip.defend(victim.model, victim.data.validation, replace(RELEASED, averaging="both"), 0)
    with pytest.raises(UserError, match="stop words"):
        strip.defend(victim.model, Texts(("the", "of") * 4, torch.zeros(8, dtype=torch.long)), RELEASED, 0)
