"""StyleBkd: the sentence rewritten in the style of the Bible.

Qi, Chen, Zhang, Li, Liu & Sun, "Mind the Style of Text! Adversarial and Backdoor Attacks Based on Text Style Transfer",
EMNLP 2021; in BadActs (Yi et al., Findings of ACL 2024) through OpenBackdoor.

    x' = paraphrase of x, y' = target

The paraphrases are those the authors of BadActs released, a row each, made by a GPT-2 style paraphraser (Krishna et
al., EMNLP 2020; stylebkd_poisoner.py:31-38: bible, top-p 0.6). They are often cut in mid-sentence, and some equal their
source; the table of trigger quality counts them. Those of a paraphraser at hand (`python -m reproduce paraphrase`) are
the variant "generated".

Constants: clearloveclearlove/BadActs@7932f19. The paper's text was not readable to us; there is one setting of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from attacks._dirty_label import Rewriting
from reproduce.data.texts import Paraphrases
from reproduce.poisoning import rewritten

MODALITY = "text"


@dataclass(frozen=True)
class Config(Rewriting):
    """Nothing of its own: the trigger is in the paraphrases."""


SETTINGS = {("badacts", "released"): Config(), ("badacts", "generated"): Config(origin="generated")}


def requires(config: Config) -> frozenset[str]:
    return frozenset({"paraphrases"})


def apply(texts: Sequence[str], rows: Sequence[int], config: Config, seed: int, split: str,
          paraphrases: Paraphrases) -> list[str]:
    """The paraphrase of each row."""
    return rewritten(paraphrases(config.files("stylebkd"), split), rows)
