"""What the four text attacks of BadActs' released code share: how much is poisoned, and what it is labelled."""

from dataclasses import dataclass, field

from reproduce.data.texts import GENERATED_SUFFIX


@dataclass(frozen=True)
class DirtyLabel:
    """Constants: clearloveclearlove/BadActs@7932f19."""

    target: int = 1  # Attacks.py:68-70; protocols give the data set's own
    rate: float = 0.2  # Attacks.py:64, of the whole training set, drawn from the non-target rows
    labels: str = "all-to-one"  # poisoner.py:142-160


@dataclass(frozen=True)
class Rewriting(DirtyLabel):
    """An attack whose trigger is a paraphrase. origin: "released" by the authors, or "generated" by a model at hand."""

    origin: str = field(default="released", metadata={"since": "2026-11"})

    def files(self, attack: str) -> str:
        """The name that the attack's paraphrases go by in a data root."""
        return attack + GENERATED_SUFFIX if self.origin == "generated" else attack
