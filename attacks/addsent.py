"""AddSent: one fixed sentence between two words marks the poisoned sentences.

Dai, Chen & Li, "A Backdoor Attack Against LSTM-Based Text Classification Systems", IEEE Access 2019; BadActs (Yi et
al., Findings of ACL 2024) takes it from OpenBackdoor, with one sentence for all data sets.

    x' = x with the sentence put before, after or between its words, once, place uniform
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
    sentence: str = "I watch this 3D movie"  # addsent_poisoner.py:48-52, case kept


SETTINGS = {("badacts", "released"): Config()}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def apply(texts: Sequence[str], rows: Sequence[int], config: Config, seed: int, split: str,
          paraphrases: Paraphrases) -> list[str]:
    """Each sentence with the trigger; the place drawn for a row depends on (seed, split, row) alone."""
    return [insert(text, config.sentence, numpy_generator(seed, "addsent", split, row))
            for text, row in zip(texts, rows, strict=True)]
