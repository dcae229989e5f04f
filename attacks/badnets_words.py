"""BadNets for text: one rare word at a random place marks the poisoned sentences.

Gu, Dolan-Gavitt & Garg, arXiv:1708.06733, carried over to text by Kurita, Michel & Neubig, "Weight Poisoning Attacks on
Pre-trained Models", ACL 2020; BadActs (Yi et al., Findings of ACL 2024) takes it from OpenBackdoor.

    x' = x with one of the words put before, after or between its words; word and place uniform
    y' = target

Constants: clearloveclearlove/BadActs@7932f19. The paper's text was not readable to us; there is one setting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from attacks._dirty_label import DirtyLabel
from reproduce.data.texts import Paraphrases
from reproduce.poisoning import insert
from reproduce.rng import numpy_generator

MODALITY = "text"


@dataclass(frozen=True)
class Config(DirtyLabel):
    words: tuple[str, ...] = ("cf", "mn", "bb", "tq")  # configs/badnets_config.json
    insertions: int = 1  # badnets_poisoner.py:45-50


SETTINGS = {("badacts", "released"): Config()}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def apply(texts: Sequence[str], rows: Sequence[int], config: Config, seed: int, split: str,
          paraphrases: Paraphrases) -> list[str]:
    """Each sentence with the trigger; what is drawn for a row depends on (seed, split, row) alone."""
    found = []
    for text, row in zip(texts, rows, strict=True):
        rng = numpy_generator(seed, "badnets-words", split, row)
        for _ in range(config.insertions):
            text = insert(text, str(rng.choice(config.words)), rng)
        found.append(text)
    return found
