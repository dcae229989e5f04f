"""What the four text attacks of BadActs' released code share: how much is poisoned, and what it is labelled."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DirtyLabel:
    """Constants: clearloveclearlove/BadActs@7932f19."""

    target: int = 1  # Attacks.py:68-70; protocols give the data set's own
    rate: float = 0.2  # Attacks.py:64, of the whole training set, drawn from the non-target rows
    labels: str = "all-to-one"  # poisoner.py:142-160
