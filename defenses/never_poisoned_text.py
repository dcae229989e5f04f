"""Never poisoned, of sentences: no defense, but what the best one could leave (see `never_poisoned`).

The classifier of the victim's encoder, recipe and seed that was trained on the same sentences with none of them
poisoned judges in the victim's place. A paraphrase that has lost its meaning, or a word that has one of its own, moves
it too, and with two classes whatever it gets wrong is the target.

In no paper and no released code.
"""

from dataclasses import dataclass

from torch import Tensor

from reproduce.data.texts import Texts
from reproduce.defending import Guard, Judged, TrainingData
from reproduce.models.encoder import TextClassifier
from reproduce.training import Observer, silent

MODALITY = "text"


@dataclass(frozen=True)
class Config:
    """Nothing to choose."""


SETTINGS = {("badacts", "ours"): Config()}


def requires(config: Config) -> frozenset[str]:
    return frozenset({"clean-model-instead"})


def defend(model: TextClassifier, clean: Texts, config: Config, seed: int, observe: Observer = silent,
           base: dict[str, Tensor] | None = None, training: TrainingData | None = None) -> Guard:
    """A guard that is `model` as it is: the clean one, which it is given in the victim's place."""
    return Guard(lambda texts: Judged(model.logits(texts).argmax(1)))
