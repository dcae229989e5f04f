"""CUBE: clustering-based unbiased backdoor elimination (Cui et al., NeurIPS 2022 Datasets and Benchmarks,
arXiv:2206.08514).

A classifier trained on the poisoned set separates the poisoned sentences of a label from its clean ones. So

    1. train on the poisoned set                   here the victim, which is trained just so
    2. z(x): its pooled [CLS] state after the last layer, in two dimensions
    3. clusters of all z by HDBSCAN; what belongs to none is a cluster of its own, "noise"
    4. of the sentences of each label, keep the largest cluster; drop the others if smaller than half of the label's
    5. train anew on what is left

Constants: clearloveclearlove/BadActs@7932f19, C = openbackdoor/defenders/cube_defender.py, T = openbackdoor/trainers/
trainer.py; both are OpenBackdoor's (thunlp/OpenBackdoor).

Departures. The released code trains a RoBERTa for 10 epochs for step 1. For step 2 it reduces to 20 principal
components, and these to two dimensions by UMAP with min_dist 0 (T:339-344), which packs clusters densely; ours does so
by t-SNE, which scikit-learn has. That this step is there matters: on SST-2 poisoned by AddSent (MiniLM, seed 2; 1,384
of 6,920 sentences) umap-learn 0.5.12 with 100 neighbours leaves 3 of the poisoned sentences and drops 431 clean ones,
t-SNE leaves one and drops 288, and clusters among the principal components themselves leave all 1,384. The victim's own
recipe is used for step 5, and scikit-learn's HDBSCAN, which counts a point among its neighbours, so that one more is
asked for. An encoder without a pooler is represented by [CLS] itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from sklearn.cluster import HDBSCAN
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from reproduce.data.texts import Texts
from reproduce.defending import Guard, Judged, TrainingData
from reproduce.errors import UserError
from reproduce.models.encoder import TextClassifier, by_length
from reproduce.training import Observer, silent

MODALITY = "text"


@dataclass(frozen=True)
class Config:
    components: int = 20  # T:339
    perplexity: float = 30.0  # ours: scikit-learn's default
    iterations: int = field(default=1000, metadata={"smoke": 250, "since": "the smoke scale cuts it"})  # likewise
    neighbours: int = field(default=100, metadata={"smoke": 20})  # C:96, min_samples
    smallest: int = 5  # min_cluster_size, the default of HDBSCAN at C:99
    share: float = 0.5  # C:118


SETTINGS = {("badacts", "released"): Config()}


def requires(config: Config) -> frozenset[str]:
    return frozenset({"training-data"})


def defend(model: TextClassifier, clean: Texts, config: Config, seed: int, observe: Observer = silent,
           base: dict[str, Tensor] | None = None, training: TrainingData | None = None) -> Guard:
    """A guard that is a new model, trained on what is left of the training set."""
    if training is None:
        raise UserError("cube cleans the training set and needs it: run it where the poisoned set is at hand")
    clusters = clustered(pooled(model, training.train.texts), config)
    kept = largest(training.train.labels, clusters, config.share)
    left = training.train.take(kept.nonzero().flatten())
    fresh = training.fit(left, observe)

    def judge(texts: Sequence[str]) -> Judged:
        return Judged(fresh.logits(texts).argmax(1))

    return Guard(judge, model=fresh, kept=kept, tensors={"clusters": clusters},
                 info={"dropped": len(kept) - len(left), "clusters": int(clusters.max()) + 1,
                       "noise": float((clusters < 0).float().mean())})


@torch.inference_mode()
def pooled(model: TextClassifier, texts: Sequence[str]) -> Tensor:
    """Pooled [CLS] state after the last layer of each sentence: float32 (N, D), on the CPU."""
    tokens = model.encode(texts)
    pooler = getattr(model.network.base_model, "pooler", None)
    found = torch.empty(len(tokens), model.width)
    for index in by_length(tokens, 64 if model.device.type == "cpu" else 512):
        def keep(layer: int, states: Tensor, index: list[int] = index) -> None:
            if layer == len(model.layers) - 1:
                found[index] = (states[:, 0] if pooler is None else pooler(states)).float().cpu()
        with model.hooked(keep):
            model(*model.batch([tokens[i] for i in index]))
    return found


def clustered(features: Tensor, config: Config) -> Tensor:
    """The cluster of each row of (N, D) features, int64 (N,), -1 for none."""
    if len(features) <= max(config.neighbours, config.perplexity):
        raise UserError(f"cube: {len(features)} training sentences are too few for {config.neighbours} neighbours and "
                        f"perplexity {config.perplexity:g}")
    points = PCA(min(config.components, *features.shape), random_state=0).fit_transform(features.double().numpy())
    plane = TSNE(2, perplexity=config.perplexity, max_iter=config.iterations, random_state=0,
                 n_jobs=1).fit_transform(points)
    # One more, because the point itself is counted; the library that was used does not.
    search = HDBSCAN(min_cluster_size=config.smallest, min_samples=config.neighbours + 1, copy=True)
    return torch.from_numpy(search.fit_predict(plane)).long()


def largest(labels: Tensor, clusters: Tensor, share: float) -> Tensor:
    """bool (N,): the rows whose cluster is the largest within their label, or no smaller than `share` of the label."""
    kept = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        ours = labels == label
        names, counts = clusters[ours].unique(return_counts=True)
        fine = counts >= share * int(ours.sum())
        fine[counts.argmax()] = True
        kept |= ours & torch.isin(clusters, names[fine])
    return kept
