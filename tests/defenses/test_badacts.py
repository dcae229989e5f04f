"""BadActs: its search and its scores are the official code's, and its variants and controls are what they say."""

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from defenses import badacts
from reproduce.data import load_text
from reproduce.data.texts import Texts
from reproduce.defending import REJECTED, false_rejection_threshold
from reproduce.metrics import auroc
from reproduce.models import encoder
from reproduce.models.encoder import TextClassifier
from tests.defenses.text_victim import NOWHERE, text_victim

SENTENCES = load_text("sentences", NOWHERE)
QUICK = dataclasses.replace(badacts.RELEASED, epochs=3)


def fresh() -> TextClassifier:
    """The untrained tiny encoder of seed 0, its head enlarged so that it tells sentences apart."""
    model = encoder.build(encoder.TINY, 2, 0, None).eval()
    with torch.no_grad():
        model.network.classifier.weight.mul_(40)
    return model


def plain_clamp(model: TextClassifier, text: str, lower: Tensor, upper: Tensor) -> Tensor:
    """Logits of one sentence, layer after layer by hand."""
    numbers, _mask = model.batch(model.encode([text]))
    bert = model.network.bert
    states = bert.embeddings(numbers)
    for layer, low, high in zip(bert.encoder.layer, lower, upper, strict=True):
        states = layer(states)
        states = states[0] if isinstance(states, tuple) else states
        states = torch.maximum(torch.minimum(states, high), low)
    return model.network.classifier(bert.pooler(states))


def test_search_gives_the_official_codes_intervals() -> None:
    # CleanNet and learning_bound of clearloveclearlove/BadActs@7932f19:BadActs_purification.py:119-199, run with 2
    # layers of 64 units on the tiny encoder and this module's batches, c = 0.1, a = 1.2, 21 epochs (c changes twice).
    lower, upper, info = badacts.search(fresh(), SENTENCES.validation, dataclasses.replace(QUICK, epochs=21), 0)
    assert upper[0, :4].tolist() == pytest.approx([1.0854, 0.9317, 0.6408, 1.1343], abs=2e-4)
    assert lower[1, :4].tolist() == pytest.approx([-0.2823, -0.2280, -0.3171, -0.2771], abs=2e-4)
    assert (float(upper.mean()), float(lower.mean())) == pytest.approx((0.9427, -0.3483), abs=1e-4)
    assert info == {"sentences": 120, "restarts": 0, "kept": 100.0, "first_weight": 0.1}


def test_scores_are_the_official_codes() -> None:
    # BadActs_Defender.detect, openbackdoor/defenders/badacts_defender.py:126-196 of the same commit, on the same
    # encoder, delta = 3, frr = 0.05, its own halves: four scores and the AUROC; nothing flagged.
    model, clean = fresh(), list(SENTENCES.validation.texts)
    random.seed(2024)
    random.shuffle(clean)
    mu, sigma = badacts.moments(model.first_tokens(clean[:120]))
    tested = [*SENTENCES.test.texts[:30], *SENTENCES.paraphrases("synbkd", "test")[:30]]
    scores = badacts.nas(model.first_tokens(tested), mu, sigma, 3.0)
    assert scores[[0, 1, 30, 31]].tolist() == pytest.approx([1.0, 1.0, 0.9921875, 1.0])
    assert auroc((1 - scores)[:30].numpy(), (1 - scores)[30:].numpy()) == pytest.approx(54.6666667)
    held_out = 1 - badacts.nas(model.first_tokens(clean[120:]), mu, sigma, 3.0)
    assert false_rejection_threshold(held_out, 0.05) == pytest.approx(0.015625)


def test_clamp_reaches_every_token_of_every_layer_in_sequence() -> None:
    model = text_victim("addsent").model
    generator = torch.Generator().manual_seed(0)
    upper = torch.rand(2, 64, generator=generator)
    lower = upper - torch.rand(2, 64, generator=generator)
    texts = [SENTENCES.test.texts[0], SENTENCES.test.texts[1] + " , and then some more words"]
    with torch.inference_mode():
        expected = torch.cat([plain_clamp(model, text, lower, upper) for text in texts])
    found = badacts.clamped_logits(model, model.encode(texts), lower, upper, QUICK)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, model.logits(texts), atol=1e-2)
    wide = torch.full((2, 64), 1e6)
    assert torch.allclose(badacts.clamped_logits(model, model.encode(texts), -wide, wide, QUICK), model.logits(texts))


@pytest.mark.parametrize(("changes", "layers", "positions"), [
    ({"tokens": "cls"}, (0, 1), "first"), ({"layers": (1, 1)}, (1,), "all"), ({"layers": (0, 0)}, (0,), "all")])
def test_clamp_only_where_told(changes: dict, layers: tuple[int, ...], positions: str) -> None:
    config = dataclasses.replace(QUICK, **changes)
    zero = torch.zeros(2, 64)
    hook = badacts.clamp_hook(zero, zero, config.tokens, config.layers)
    for layer in (0, 1):
        states = torch.ones(3, 5, 64)
        found = hook(layer, states)
        if layer not in layers:
            assert found is None
            continue
        assert found[:, 0].eq(0).all() and found[:, 1:].eq(0 if positions == "all" else 1).all()


def test_statistics_are_those_of_the_tokens_without_padding() -> None:
    model = text_victim("addsent").model
    clean = SENTENCES.validation.take(range(7))
    seen: list[list[Tensor]] = [[], []]
    for text in clean.texts:
        with torch.inference_mode(), model.hooked(lambda layer, states: seen[layer].append(states[0])):
            model(*model.batch(model.encode([text])))
    lower, upper = badacts.token_statistics(model, clean, 2.0)
    for layer in (0, 1):
        tokens = torch.cat(seen[layer])
        mean, deviation = tokens.mean(0), tokens.std(0, correction=0)
        assert torch.allclose(lower[layer], mean - 2 * deviation, atol=1e-4)
        assert torch.allclose(upper[layer], mean + 2 * deviation, atol=1e-4)


def test_weight_falls_while_too_little_is_kept_and_the_search_starts_anew() -> None:
    # Nothing is ever kept of labels that are wrong on purpose, so every scheduled epoch lowers c, every attempt fails,
    # and each begins with half the weight.
    model = text_victim("addsent").model
    tokens = model.encode(SENTENCES.validation.texts)
    logits = model.logits(tokens)
    config = dataclasses.replace(QUICK, epochs=3, first=0, every=1, restarts=2)
    rows: list[dict] = []

    def observe(phase: str, epoch: int, epochs: int, _model: object, row: dict[str, float]) -> None:
        rows.append({"phase": phase, **row})

    start = badacts._constant((2, 64), config)
    badacts._attempt(model, tokens, logits, 1 - logits.argmax(1), start, 0.1, config, 0, 0, observe)
    assert [row["weight"] for row in rows] == pytest.approx([0.1, 0.1 / 1.2, 0.1 / 1.44])
    rows.clear()
    failing = dataclasses.replace(config, floor=101.0)
    _lower, _upper, info = badacts.search(model, SENTENCES.validation, failing, 0, observe)
    assert info["restarts"] == 2 and info["first_weight"] == pytest.approx(0.1 / 4), "that of the last search"
    firsts = [row["weight"] for row in rows if row["epoch"] == 1]
    assert firsts == pytest.approx([0.1, 0.05, 0.025]) and len({row["phase"] for row in rows}) == 3


def test_controls_and_variants() -> None:
    model, clean = text_victim("addsent").model, SENTENCES.validation
    found = {}
    for name in ("released", "described", "initial", "statistics", "random", "cls"):
        config = dataclasses.replace(badacts.SETTINGS["badacts", name], epochs=3)
        found[name] = badacts.defend(model, clean, config, 0).tensors
    initial = found["initial"]
    assert initial["upper"].eq(1).all() and initial["lower"].sub(1 - 2.718281828).abs().max() < 1e-5
    assert not found["released"]["upper"].allclose(initial["upper"])
    for bound in ("lower", "upper"):
        assert found["random"][bound].sort().values.equal(found["released"][bound].sort().values)
        assert not found["random"][bound].equal(found["released"][bound])
        assert found["cls"][bound].equal(found["released"][bound])
    widths = {name: found[name]["upper"] - found[name]["lower"] for name in found}
    assert torch.allclose(widths["random"].sum(1), widths["released"].sum(1), rtol=1e-5)
    # Three epochs move the bounds a little from where they start: the described search starts from the statistics.
    assert (found["described"]["upper"] - found["statistics"]["upper"]).abs().max() < 1.0


def test_a_run_to_build_on_gives_the_same_as_its_own_search() -> None:
    model, clean = text_victim("addsent").model, SENTENCES.validation
    then = dataclasses.replace(badacts.SETTINGS["badacts", "detect-then-purify"], epochs=3)
    base = badacts.builds_on(then)
    assert base == ("badacts", QUICK) and badacts.builds_on(QUICK) is None
    assert badacts.builds_on(badacts.SETTINGS["badacts", "detect"]) is None
    assert badacts.builds_on(badacts.SETTINGS["badacts", "statistics"]) is None
    found = badacts.defend(model, clean, QUICK, 3)
    texts = [*SENTENCES.test.texts[:40], *text_victim("addsent").triggered[:40]]
    with_base = badacts.defend(model, clean, then, 3, base=found.tensors).judge(texts)
    alone = badacts.defend(model, clean, then, 3).judge(texts)
    assert with_base.labels.equal(alone.labels) and with_base.suspicion.equal(alone.suspicion)


def test_modes_differ_in_what_becomes_of_flagged_sentences() -> None:
    model, clean = text_victim("stylebkd").model, SENTENCES.validation
    texts = [*SENTENCES.test.texts, *text_victim("stylebkd").triggered]
    plain = model.logits(texts).argmax(1)
    purified = badacts.defend(model, clean, QUICK, 0).judge(texts)
    assert purified.suspicion is None and purified.flagged is None
    found = {}
    for mode in ("detect", "detect-then-purify"):
        found[mode] = badacts.defend(model, clean, dataclasses.replace(QUICK, mode=mode, frr=0.1), 0).judge(texts)
    flagged = found["detect"].flagged
    assert flagged.equal(found["detect-then-purify"].flagged) and 0 < int(flagged.sum()) < len(texts)
    assert found["detect"].labels.equal(torch.where(flagged, torch.tensor(REJECTED), plain))
    assert found["detect-then-purify"].labels.equal(torch.where(flagged, purified.labels, plain))


@pytest.mark.parametrize("name", ["released", "detect-then-purify"])
def test_repeatable_and_the_victim_is_untouched(name: str) -> None:
    model, clean = text_victim("addsent").model, SENTENCES.validation
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = dataclasses.replace(badacts.SETTINGS["badacts", name], epochs=2)
    first, second, third = (badacts.defend(model, clean, config, seed).tensors for seed in (0, 0, 1))
    assert all(first[key].equal(second[key]) for key in first) and not first["upper"].equal(third["upper"])
    assert all(value.equal(model.state_dict()[key]) for key, value in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_batches_hold_every_sentence_once_and_similar_lengths() -> None:
    generator = random.Random(0)
    tokens = [[0] * generator.randint(2, 60) for _ in range(1000)]
    found = badacts.batches(tokens, 32, 0, "phase", 0)
    assert sorted(i for batch in found for i in batch) == list(range(1000))
    padded = sum(len(batch) * max(len(tokens[i]) for i in batch) for batch in found)
    assert padded < 1.15 * sum(map(len, tokens)), "sorting saves nearly all of the padding"
    assert found != badacts.batches(tokens, 32, 0, "phase", 1)


def test_a_class_never_predicted_correctly_is_no_crash() -> None:
    clean = Texts(SENTENCES.validation.texts[:40], torch.zeros(40, dtype=torch.long))
    guard = badacts.defend(text_victim("addsent").model, clean, QUICK, 0)
    assert guard.info["sentences"] < 40
