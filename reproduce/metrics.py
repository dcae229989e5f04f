"""What is measured on a victim or a repaired model, from its per-sample predictions alone.

    ACC            share of all clean test images classified correctly
    ACC nontarget  the same on the images the trigger is tested on: those not of the target class (all-to-one and
                   clean-label), all of them (all-to-all). NAD's, ARGD's and MCLDef's code reports this as accuracy.
    ASR            share of those images that, triggered, get the label the attacker wants
    base rate      share of them that the same model gives that label without the trigger: an ASR that no backdoor is
                   needed for
    excess ASR     ASR - base rate: what the trigger brings about; below 0 where it hides more than it calls
    RA             share of those images that, triggered, still get their true label; ASR + RA <= 100
All in percent. A single run's interval is Wilson's. For sentences ACC is BadActs' CACC, and RA its PACC.

Of a defense that detects (suspicion high = poisoned, flagged or not):

    AUROC          that a triggered input is more suspicious than a clean one, over all test inputs
    AUROC target   the same on the inputs that the undefended victim calls the target: clean inputs of other classes,
                   and triggers that failed, are not what a detector is for
    FRR            share of the clean test inputs that are flagged
    FAR            share of the triggered ones that are not
"""

import hashlib
import math
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

    def agreement(self, other: "Predictions") -> float:
        """Percent of the predicted labels that `other`, on the same test set, has too."""
        return 100 * float(np.mean(np.concatenate([self.clean == other.clean, self.triggered == other.triggered])))

    def digest(self) -> str:
        """SHA-256 of the predicted labels, in whatever integers they are."""
        return hashlib.sha256(np.concatenate([self.clean, self.triggered]).astype("<i8").tobytes()).hexdigest()

    def hits(self) -> dict[str, np.ndarray]:
        """Per-sample success (bool) behind each metric."""
        truth = self.labels[self.index]
        return {
            "acc": self.clean == self.labels,
            "acc_nontarget": self.clean[self.index] == truth,
            "asr": self.triggered == self.wanted,
            "base_rate": self.clean[self.index] == self.wanted,
            "ra": self.triggered == truth,
        }


def metrics(predictions: Predictions) -> dict[str, float | int | None]:
    """acc, acc_nontarget, asr, base_rate, ra in percent (None where there is no triggered image), and the two counts.
    """
    values: dict[str, float | int | None] = {
        name: 100 * float(np.mean(hit)) if len(hit) else None for name, hit in predictions.hits().items()
    }
    return values | {"n_clean": len(predictions.labels), "n_nontarget": len(predictions.index)}


@dataclass(frozen=True)
class Detection:
    """Per-sample outcome of a detector on one test set.

    clean: (N,) and triggered: (M,) suspicion; flagged_clean, flagged_triggered: bool, the same shapes; plain_clean,
    plain_triggered: labels that the undefended victim predicts; held_out: (H,) suspicion of the clean inputs that the
    threshold was chosen on, empty where it was not.
    """

    clean: np.ndarray
    triggered: np.ndarray
    flagged_clean: np.ndarray
    flagged_triggered: np.ndarray
    plain_clean: np.ndarray
    plain_triggered: np.ndarray
    held_out: np.ndarray

    def hits(self) -> dict[str, np.ndarray]:
        """Per-sample outcome (bool) counted by FAR and FRR."""
        return {"far": ~self.flagged_triggered, "frr": self.flagged_clean}


def auroc(clean: np.ndarray, triggered: np.ndarray) -> float:
    """Area under the ROC curve in percent, ties half: suspicion of clean (N,) and triggered (M,) inputs; NaN if one is
    empty (Mann-Whitney's U over N * M)."""
    if not len(clean) or not len(triggered):
        return math.nan
    ranks = stats.rankdata(np.concatenate([clean, triggered]))
    u = ranks[len(clean):].sum() - len(triggered) * (len(triggered) + 1) / 2
    return 100 * float(u / (len(clean) * len(triggered)))


def detection_metrics(detection: Detection, target: int) -> dict[str, float | None]:
    """auroc, auroc_target, far, frr in percent; None where there is nothing to count."""
    found = {
        "auroc": auroc(detection.clean, detection.triggered),
        "auroc_target": auroc(detection.clean[detection.plain_clean == target],
                              detection.triggered[detection.plain_triggered == target]),
        **{name: 100 * float(np.mean(hit)) if len(hit) else math.nan for name, hit in detection.hits().items()},
    }
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion, in percent."""
    interval = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    return 100 * interval.low, 100 * interval.high
