"""What is measured on a victim or a repaired model, from its per-sample predictions alone.

    ACC            share of all clean test images classified correctly
    ACC nontarget  the same on the images the trigger is tested on: those not of the target class (all-to-one and
                   clean-label), all of them (all-to-all). NAD's, ARGD's and MCLDef's code reports this as accuracy.
    ASR            share of those images that, triggered, get the label the attacker wants
    RA             share of those images that, triggered, still get their true label; ASR + RA <= 100
All in percent. A single run's interval is Wilson's.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Predictions:
    """Per-sample outcome on one test set.

    labels, clean: (N,) true and predicted labels of the clean test images.
    index: (M,) which of them were triggered; wanted, triggered: (M,) the attacker's label and the predicted one.
    Without an attack the last three are empty.
    """

    labels: np.ndarray
    clean: np.ndarray
    index: np.ndarray
    wanted: np.ndarray
    triggered: np.ndarray

    def hits(self) -> dict[str, np.ndarray]:
        """Per-sample success (bool) behind each metric."""
        truth = self.labels[self.index]
        return {
            "acc": self.clean == self.labels,
            "acc_nontarget": self.clean[self.index] == truth,
            "asr": self.triggered == self.wanted,
            "ra": self.triggered == truth,
        }


def metrics(predictions: Predictions) -> dict[str, float | int | None]:
    """acc, acc_nontarget, asr, ra in percent (None where there is no triggered image), and the two counts."""
    values: dict[str, float | int | None] = {
        name: 100 * float(np.mean(hit)) if len(hit) else None for name, hit in predictions.hits().items()
    }
    return values | {"n_clean": len(predictions.labels), "n_nontarget": len(predictions.index)}


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, in percent."""
    interval = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return 100 * interval.low, 100 * interval.high
