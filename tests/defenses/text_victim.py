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
    data, module = load_text("sentences", NOWHERE), attack_module(attack)
    config = module.Config()

    def trigger(texts: list[str], rows: list[int], split: str = "train") -> list[str]:
        return module.apply(texts, rows, config, 0, split, data.paraphrases)

    train, mask = poison_texts(data.train, config, 0, trigger)
    model = trained(train)
    rows = (data.test.labels != TARGET).nonzero().flatten().tolist()
    return Victim(model, data, train, mask, tuple(trigger([data.test.texts[i] for i in rows], rows, "test")))


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
