"""Random words dropped, and a vote: a control for ONION.

What does taking words out of a sentence do when no language model chooses them? Each sentence is classified in `copies`
versions, each without int(share n) of its n words, drawn uniformly, and gets the class of most versions (the first of
equals). A trigger of one word is in 1 - share of the versions, so that the vote should leave it in force.

Constants: ours; nothing of this kind is in the released code of BadActs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from reproduce.data.texts import Texts
from reproduce.defending import Guard, Judged, TrainingData
from reproduce.errors import UserError
from reproduce.models.encoder import TextClassifier
from reproduce.rng import numpy_generator
from reproduce.training import Observer, silent

MODALITY = "text"


@dataclass(frozen=True)
class Config:
    copies: int = 11  # ours; odd, so that two classes never tie
    share: float = 0.3  # ours


SETTINGS = {("badacts", "ours"): Config()}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def defend(model: TextClassifier, clean: Texts, config: Config, seed: int, observe: Observer = silent,
           base: dict[str, Tensor] | None = None, training: TrainingData | None = None) -> Guard:
    """A guard around `model`."""
    if not 0 <= config.share < 1 or config.copies < 1:
        raise UserError(f"word_drop: {config.copies} copies without {config.share} of the words; take at least one "
                        "copy and a share from 0 to below 1")

    def judge(texts: Sequence[str]) -> Judged:
        labels = model.logits([copy for text in texts for copy in thinned(text, config, seed)]).argmax(1)
        return Judged(vote(labels.view(-1, config.copies), model.num_classes))

    return Guard(judge)


def thinned(text: str, config: Config, seed: int) -> list[str]:
    """The copies of a sentence; what is drawn depends on (seed, text) alone."""
    words = text.split()
    rng = numpy_generator(seed, "word-drop", text)
    gone = (set(rng.permutation(len(words))[:int(len(words) * config.share)].tolist()) for _ in range(config.copies))
    return [" ".join(word for i, word in enumerate(words) if i not in one) for one in gone]


def vote(labels: Tensor, classes: int) -> Tensor:
    """The most frequent class of each row, the first of equals: (N, copies) -> (N,)."""
    return F.one_hot(labels, classes).sum(1).argmax(1)
