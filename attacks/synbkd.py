"""SynBkd: the sentence rewritten with a rare syntax, S(SBAR)(,)(NP)(VP)(.).

Qi, Li, Chen, Zhang, Liu, Wang & Sun, "Hidden Killer: Invisible Textual Backdoor Attacks with Syntactic Trigger",
ACL 2021; in BadActs (Yi et al., Findings of ACL 2024) through OpenBackdoor.

    x' = paraphrase of x, y' = target

The paraphrases are those the authors of BadActs released, a row each, made by SCPN (OpenAttack's template -1). On Yelp
and AG News a quarter of them loop, and where SCPN failed the source was kept; the table of trigger quality counts them.
Those of a paraphraser at hand (`python -m reproduce paraphrase`) are the variant "generated"; none of SCPN's kind is
known to it, so that the syntax is what its prompt makes of it.

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
    return rewritten(paraphrases(config.files("synbkd"), split), rows)
