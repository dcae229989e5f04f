"""STRIP for text (Gao et al., IEEE TDSC 2021, arXiv:1911.10312): a trigger holds the prediction when words change.

Each sentence gets `copies` copies in which int(swap n) times a random one of its n words is replaced by a word of a
random clean sentence, its words taken by descending TF-IDF. With f(x_r) the class probabilities of copy r,

    H(x) = mean_r -sum_k f_k(x_r) log2 f_k(x_r)

A low entropy means poisoned: suspicion is -H. TF-IDF comes from half of the clean sentences; the threshold is what the
share `frr` of the other half exceeds.

Constants: clearloveclearlove/BadActs@7932f19, openbackdoor/defenders/strip_defender.py.

Variants. The released code stores the copies of a sentence next to each other (:123) and averages as if the copies
number r of all sentences were next to each other (:137), so that each of its scores mixes copies of different
sentences; with the scored set in the order clean, then poisoned, much of the separation is lost. `released` averages
like that over the sentences handed to `judge` in one call, so that it is comparable only where clean and poisoned
ones are judged together. `corrected` averages over the copies of each sentence.

Departures. Draws depend on (seed, sentence) alone; words of equal TF-IDF, mostly those that the clean sentence does not
have, come in alphabetical order, where the released order is that of an unstable sort.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from reproduce.data.texts import Texts
from reproduce.defending import Guard, Judged, TrainingData, false_rejection_threshold, halves, judged
from reproduce.errors import UserError
from reproduce.models.encoder import TextClassifier
from reproduce.rng import numpy_generator
from reproduce.training import Observer, silent

MODALITY = "text"


@dataclass(frozen=True)
class Config:
    """averaging: "mixed", as released, or "per-sentence"."""

    copies: int = 5  # :46
    swap: float = 0.5  # :47
    frr: float = 0.05  # :48
    averaging: str = "mixed"  # :137


SETTINGS = {
    ("badacts", "released"): Config(),
    ("badacts", "corrected"): Config(averaging="per-sentence"),
}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def defend(model: TextClassifier, clean: Texts, config: Config, seed: int, observe: Observer = silent,
           base: dict[str, Tensor] | None = None, training: TrainingData | None = None) -> Guard:
    """A guard around `model`."""
    if config.averaging not in ("mixed", "per-sentence"):
        raise UserError(f"strip: there is no averaging {config.averaging}; take mixed or per-sentence")
    source, held = halves(clean, seed, "strip-halves")
    words = Replacements(source.texts)

    def suspicion(texts: Sequence[str]) -> Tensor:
        copies = [copy for text in texts for copy in perturbed(text, words, config, seed)]
        return -averaged(entropy(model.logits(copies).softmax(1)), config)

    held_out = suspicion(held.texts)
    threshold = false_rejection_threshold(held_out, config.frr)

    def judge(texts: Sequence[str]) -> Judged:
        return judged(model.logits(texts).argmax(1), suspicion(texts), threshold)

    return Guard(judge, threshold=threshold, held_out=held_out)


class Replacements:
    """The words of clean sentences, and their order by TF-IDF in each."""

    def __init__(self, texts: Sequence[str]) -> None:
        vectorizer = TfidfVectorizer(use_idf=True, smooth_idf=True, norm=None, stop_words="english")   # :59
        try:
            self.weights = vectorizer.fit_transform(texts).tocsr()
        except ValueError as error:
            raise UserError("strip: the clean sentences hold no words beside stop words; take more of them") from error
        self.words: list[str] = vectorizer.get_feature_names_out().tolist()

    def of(self, row: int, count: int) -> list[str]:
        """The first `count` words by descending TF-IDF in the clean sentence number `row`."""
        start, end = self.weights.indptr[row], self.weights.indptr[row + 1]
        columns, values = self.weights.indices[start:end], self.weights.data[start:end]
        first = columns[np.lexsort((columns, -values))].tolist()
        if count > len(first):
            own = set(first)
            first += [column for column in range(min(count + len(own), len(self.words))) if column not in own]
        return [self.words[column] for column in first[:count]]


def perturbed(text: str, words: Replacements, config: Config, seed: int) -> list[str]:
    """The copies of a sentence; what is drawn depends on (seed, text) alone."""
    rng = numpy_generator(seed, "strip", text)
    found = []
    for _ in range(config.copies):
        copy = text.split()
        row = int(rng.integers(words.weights.shape[0]))
        places = rng.integers(0, max(len(copy), 1), int(len(copy) * config.swap)).tolist()
        # A later word may replace an earlier one, as released; and a vocabulary may end before the places do.
        for place, word in zip(places, words.of(row, len(places)), strict=False):
            copy[place] = word
        found.append(" ".join(copy))
    return found


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in bits of (N, K) probabilities: (N,)."""
    return (torch.special.entr(probabilities.double()).sum(1) / np.log(2)).float()


def averaged(entropies: Tensor, config: Config) -> Tensor:
    """Mean over the copies, stored sentence after sentence: (N copies,) -> (N,)."""
    if config.averaging == "mixed":
        return entropies.view(config.copies, -1).mean(0)
    return entropies.view(-1, config.copies).mean(1)
