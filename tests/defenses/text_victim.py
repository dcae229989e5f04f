"""A small text classifier with a backdoor, trained once on the embedded sentences, for the tests of text defenses."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from reproduce.data import load_text
from reproduce.data.texts import TextDataset, Texts
from reproduce.defending import Judged
from reproduce.finetuning import TextRecipe, fine_tune
from reproduce.models.encoder import TINY, TextClassifier, build
from reproduce.poisoning import attack_module, poison_texts

NOWHERE = Path("no-data-needed")
RECIPE = TextRecipe(epochs=6, rate=2e-3, warmup=1, batch=32)
TARGET = 1


@dataclass(frozen=True)
class Victim:
    """triggered: the negative test sentences with the trigger, which the model takes for positive."""

    model: TextClassifier
    data: TextDataset
    train: Texts
    poisoned: Tensor
    triggered: tuple[str, ...]

    def weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def untouched(self, before: dict[str, Tensor]) -> bool:
        after = self.model.state_dict()
        return not self.model.training and all(torch.equal(after[name], value) for name, value in before.items())


@cache
def text_victim(attack: str = "badnets_words") -> Victim:
    data, train, mask, triggered = poisoned_texts(attack)
    return Victim(trained(train), data, train, mask, triggered)


@cache
def poisoned_texts(attack: str) -> tuple[TextDataset, Texts, Tensor, tuple[str, ...]]:
    """The embedded sentences, their poisoned training set, its mask, and the negative test sentences with the trigger.
    """
    data, module = load_text("sentences", NOWHERE), attack_module(attack)
    config = module.Config()

    def trigger(texts: list[str], rows: list[int], split: str = "train") -> list[str]:
        return module.apply(texts, rows, config, 0, split, data.paraphrases)

    train, mask = poison_texts(data.train, config, 0, trigger)
    rows = (data.test.labels != TARGET).nonzero().flatten().tolist()
    return data, train, mask, tuple(trigger([data.test.texts[i] for i in rows], rows, "test"))


def trained(train: Texts) -> TextClassifier:
    model = build(TINY, 2, 0, NOWHERE)
    with torch.random.fork_rng():
        fine_tune(model, train, load_text("sentences", NOWHERE).validation, RECIPE, 0, phase="victim")
    return model


def auroc(clean: Judged, poisoned: Judged) -> float:
    """Probability that a poisoned sentence is more suspicious than a clean one, ties counted half."""
    assert clean.suspicion is not None and poisoned.suspicion is not None
    apart = poisoned.suspicion[:, None] - clean.suspicion[None]
    return float((apart > 0).double().mean() + (apart == 0).double().mean() / 2)


def share(labels: Tensor, wanted: Tensor | int) -> float:
    return float((labels == wanted).double().mean())


def save_suspect(folder: Path) -> None:
    """Somebody's own backdoored classifier: model/ as save_pretrained writes it, clean.tsv, and input.txt with 20 clean
    sentences and 20 triggered ones."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    data, train, _mask, triggered = poisoned_texts("addsent")
    words = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
                           *sorted({word.lower() for text in train.texts for word in text.split()})])
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = BertForSequenceClassification(BertConfig(
            vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=64, num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}))
    model = TextClassifier(network, lambda texts, longest: tokenizer(
        list(texts), truncation=True, max_length=longest)["input_ids"], 0)
    fine_tune(model, train, data.validation, RECIPE, 0, phase="victim")
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    clean = data.validation
    (folder / "clean.tsv").write_text("text\tlabel\n" + "".join(
        f"{text}\t{label}\n" for text, label in zip(clean.texts, clean.labels.tolist(), strict=True)))
    (folder / "input.txt").write_text("\n".join([*data.test.texts[:20], *triggered[:20]]) + "\n")
