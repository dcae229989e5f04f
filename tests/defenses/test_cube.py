"""CUBE: filtering against the official code, clustering on clouds of points, and what it does to a training set."""

from dataclasses import replace

import pytest
import torch
from sklearn.cluster import HDBSCAN

from defenses import cube
from reproduce.data.texts import Texts
from reproduce.defending import TrainingData
from reproduce.errors import UserError
from reproduce.models.encoder import TextClassifier
from reproduce.rng import generator
from tests.defenses.text_victim import share, text_victim, trained

RELEASED = cube.SETTINGS["badacts", "released"]
SMALL = replace(RELEASED, neighbours=20)
# clearloveclearlove/BadActs@7932f19, openbackdoor/defenders/cube_defender.py:106-151 (filtering): rows kept of 44 with
# labels i % 3 and these clusters, and of 14 with clusters of no more than, and just, half of a label.
CLUSTERS = [-1, 1, 0, -1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 2, 2, -1, 2, -1, -1, 0, 0, 1, 1, -1, 0, 1, 2, 0, 1, 0, 1, 2, 1,
            -1, 1, 0, -1, 1, 0, 0, 1, 1, 1, 0]
OFFICIAL_KEPT = [0, 1, 2, 3, 4, 5, 7, 11, 15, 18, 20, 22, 25, 28, 29, 33, 34, 35, 36, 37, 38, 40]
HALVES = [-1, -1, -1, -1, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
OFFICIAL_KEPT_HALVES = [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13]


def test_what_is_kept_is_what_the_official_code_keeps() -> None:
    kept = cube.largest(torch.arange(44) % 3, torch.tensor(CLUSTERS), 0.5)
    assert kept.nonzero().flatten().tolist() == OFFICIAL_KEPT
    kept = cube.largest(torch.tensor([0] * 6 + [1] * 8), torch.tensor(HALVES), 0.5)
    assert kept.nonzero().flatten().tolist() == OFFICIAL_KEPT_HALVES


def test_clouds_of_points_become_clusters_and_only_the_small_one_of_a_label_is_dropped() -> None:
    rng = generator(0, "clouds")
    centres = torch.zeros(3, 30)
    centres[1, 0], centres[2, 1] = 8, 8
    cloud = torch.tensor([0] * 150 + [1] * 150 + [2] * 50)
    labels = torch.tensor([0] * 150 + [1] * 200)
    clusters = cube.clustered(centres[cloud] + 0.3 * torch.randn(350, 30, generator=rng), SMALL)
    assert int(clusters.max()) == 2
    for one in range(3):
        names, counts = clusters[cloud == one].unique(return_counts=True)
        assert names[counts.argmax()] >= 0 and counts.max() > 0.7 * counts.sum()
    kept = cube.largest(labels, clusters, 0.5)
    assert not kept[cloud == 2].any()
    assert share(kept[cloud != 2], 1) > 0.7


def test_neighbouring_clouds_are_told_apart_only_in_the_plane() -> None:
    points = torch.randn(400, 20, generator=generator(0, "near"))
    points[300:, 0] += 6
    several = replace(RELEASED, neighbours=40)
    clusters = cube.clustered(points, several)
    assert share(clusters[:300], int(clusters[0])) > 0.95 and share(clusters[300:], int(clusters[300])) > 0.95
    assert clusters[0] != clusters[300] and clusters[0] >= 0 and clusters[300] >= 0
    where_they_are = HDBSCAN(several.smallest, min_samples=several.neighbours + 1, copy=True).fit_predict(points)
    assert (where_they_are < 0).mean() > 0.3, "which is why the plane is there"


def test_more_neighbours_than_poisoned_sentences_find_no_cluster_of_them() -> None:
    rng = generator(0, "clouds")
    points = torch.randn(260, 4, generator=rng)
    points[:130, 0] += 30
    points[:20, 1] += 12
    assert int(cube.clustered(points, replace(SMALL, neighbours=10)).max()) == 2
    assert int(cube.clustered(points, replace(SMALL, neighbours=60)).max()) == 1


def test_features_are_what_the_head_of_the_classifier_sees() -> None:
    victim = text_victim()
    texts = victim.data.test.texts[:9]
    head = victim.model.network.classifier
    with torch.no_grad():
        torch.testing.assert_close(head(cube.pooled(victim.model, texts)), victim.model.logits(texts),
                                   rtol=1e-4, atol=1e-4)


def test_the_new_model_is_trained_on_what_is_left() -> None:
    victim = text_victim()
    before = victim.weights()
    seen: list[Texts] = []

    def fit(texts: Texts, observe: object) -> TextClassifier:
        seen.append(texts)
        return trained(texts)

    guard = cube.defend(victim.model, victim.data.validation, SMALL, 0, training=TrainingData(victim.train, fit))
    kept = guard.kept
    assert seen[0].texts == victim.train.take(kept.nonzero().flatten()).texts
    assert guard.info["dropped"] == len(victim.train) - len(seen[0]) == int((~kept).sum()) > 0
    assert guard.model is not None and guard.model is not victim.model
    found = guard.judge(victim.data.test.texts)
    assert torch.equal(found.labels, guard.model.logits(victim.data.test.texts).argmax(1)) and found.flagged is None
    assert share(found.labels, victim.data.test.labels) > 0.8
    assert victim.untouched(before)


def test_it_helps_where_the_poison_is_a_cluster_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    victim = text_victim()
    monkeypatch.setattr(cube, "clustered", lambda features, config: victim.train.labels + victim.poisoned.long())
    guard = cube.defend(victim.model, victim.data.validation, SMALL, 0,
                        training=TrainingData(victim.train, lambda texts, observe: trained(texts)))
    assert torch.equal(guard.kept, ~victim.poisoned)
    assert share(guard.judge(victim.triggered).labels, 1) < 0.2


def test_bad_settings_are_one_line() -> None:
    victim = text_victim()
    assert cube.requires(RELEASED) == {"training-data"}
    with pytest.raises(UserError, match="training set"):
        cube.defend(victim.model, victim.data.validation, RELEASED, 0)
    few = TrainingData(victim.train.take(range(50)), lambda texts, observe: trained(texts))
    with pytest.raises(UserError, match="100 neighbours"):
        cube.defend(victim.model, victim.data.validation, RELEASED, 0, training=few)
