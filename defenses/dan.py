"""DAN: distance-based anomaly score (Chen et al., Findings of EMNLP 2022, arXiv:2210.07907).

Poisoned sentences lie far from the clean ones in the feature space of some layer. With z_l(x) the mean over the tokens
of what layer l gives, mu_lc its mean over clean sentences of class c and S_l the covariance of z_l - mu_lc, shrunk,
(1 - s) C + s tr(C) / D I,

    d_l(x)  = min_c (z_l(x) - mu_lc)^T S_l^-1 (z_l(x) - mu_lc)
    DAN(x)  = mean_l (d_l(x) - m_l) / s_l

m_l and s_l are mean and standard deviation of d_l over the share `held` of the clean sentences, which the rest of the
statistics does not see. Suspicion is DAN(x); the threshold is the quantile 1 - frr over the same held-out sentences.

Constants: clearloveclearlove/BadActs@7932f19, openbackdoor/defenders/dan_defender.py. There z is a mean over tokens
(:183); the class means and the distances take in sentences of every class and prediction.

Departures. Means and covariances are computed in double precision; distances of sentences to themselves only, where the
released code computes those of all pairs and takes the diagonal (:253).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.covariance import ShrunkCovariance
from torch import Tensor

from reproduce.data.texts import Texts
from reproduce.defending import Guard, Judged, TrainingData, halves, judged
from reproduce.errors import UserError
from reproduce.models.encoder import TextClassifier, by_length
from reproduce.training import Observer, silent

MODALITY = "text"


@dataclass(frozen=True)
class Config:
    shrinkage: float = 0.1  # :225, scikit-learn's default
    held: float = 0.2  # :83
    frr: float = 0.05  # :40


SETTINGS = {("badacts", "released"): Config()}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def defend(model: TextClassifier, clean: Texts, config: Config, seed: int, observe: Observer = silent,
           base: dict[str, Tensor] | None = None, training: TrainingData | None = None) -> Guard:
    """A guard around `model`."""
    held, fitted = halves(clean, seed, "dan-held", config.held)
    if len(held) < 2 or len(fitted) < 2:
        raise UserError(f"dan: {len(clean)} clean sentences are too few; it needs at least {round(2 / config.held)}")
    means, precisions = statistics(token_means(model, fitted.texts), fitted.labels, config.shrinkage)
    distances = mahalanobis(token_means(model, held.texts), means, precisions)
    normal = Normal(distances)
    held_out = normal.score(distances)
    threshold = float(held_out.quantile(1 - config.frr))

    def judge(texts: Sequence[str]) -> Judged:
        suspicion = normal.score(mahalanobis(token_means(model, texts), means, precisions))
        return judged(model.logits(texts).argmax(1), suspicion, threshold)

    return Guard(judge, threshold=threshold, held_out=held_out)


@torch.inference_mode()
def token_means(model: TextClassifier, texts: Sequence[str]) -> Tensor:
    """Mean over the tokens of each sentence, special ones too, after each layer: float32 (N, layers, D), on the CPU."""
    tokens = model.encode(texts)
    found = torch.empty(len(tokens), len(model.layers), model.width)
    for index in by_length(tokens, 64 if model.device.type == "cpu" else 512):
        numbers, mask = model.batch([tokens[i] for i in index])

        def keep(layer: int, states: Tensor, index: list[int] = index, mask: Tensor = mask) -> None:
            real = mask[:, :, None].float()
            found[index, layer] = ((states.float() * real).sum(1) / real.sum(1)).cpu()

        with model.hooked(keep):
            model(numbers, mask)
    return found


def statistics(features: Tensor, labels: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Class means, (layers, classes, D), and shrunk precisions, (layers, D, D), of features (N, layers, D); float64.

    Of the classes that occur in `labels`."""
    wide = features.double()
    classes = labels.unique()
    means = torch.stack([wide[labels == c].mean(0) for c in classes], 1)
    centred = wide - means[:, torch.searchsorted(classes, labels)].transpose(0, 1)
    fitted = [ShrunkCovariance(shrinkage=shrinkage).fit(layer.numpy()) for layer in centred.unbind(1)]
    return means, torch.stack([torch.from_numpy(one.precision_) for one in fitted])


def mahalanobis(features: Tensor, means: Tensor, precisions: Tensor) -> Tensor:
    """Squared distance to the nearest class mean: (N, layers, D) -> float64 (N, layers)."""
    found = []
    for layer in range(len(means)):
        apart = features[:, layer, None].double() - means[layer]     # (N, classes, D)
        found.append(((apart @ precisions[layer]) * apart).sum(2).min(1).values)
    return torch.stack(found, 1)


class Normal:
    """m_l and s_l of held-out distances (N, layers)."""

    def __init__(self, distances: Tensor) -> None:
        self.mean, self.deviation = distances.mean(0), distances.std(0, correction=0)

    def score(self, distances: Tensor) -> Tensor:
        """DAN(x) of distances (N, layers): float32 (N,)."""
        return ((distances - self.mean) / self.deviation).mean(1).float()
