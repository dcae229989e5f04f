"""ACC, ASR and RA from predictions, and Wilson's interval."""

import numpy as np
import pytest
import torch

from reproduce.evaluation import evaluate
from reproduce.images import triggered_test_set
from reproduce.metrics import Predictions, metrics, wilson
from reproduce.models import build


def test_definitions_on_a_case_counted_by_hand() -> None:
    # Five test images; class 1 is the target, so images 0, 2, 3 are triggered.
    predictions = Predictions(labels=np.array([0, 1, 2, 2, 1]), clean=np.array([0, 1, 2, 0, 0]),
                              index=np.array([0, 2, 3]), wanted=np.array([1, 1, 1]), triggered=np.array([1, 2, 0]))
    found = metrics(predictions)
    assert found == {"acc": pytest.approx(60), "acc_nontarget": pytest.approx(200 / 3), "asr": pytest.approx(100 / 3),
                     "base_rate": 0, "ra": pytest.approx(100 / 3), "n_clean": 5, "n_nontarget": 3}


def test_the_base_rate_counts_the_same_images_without_the_trigger() -> None:
    # Class 1 is the target. Image 0 is called 1 anyway, image 2 only when triggered; image 1 is of class 1 itself.
    found = metrics(Predictions(labels=np.array([0, 1, 2, 3]), clean=np.array([1, 1, 2, 3]), index=np.array([0, 2, 3]),
                                wanted=np.array([1, 1, 1]), triggered=np.array([1, 1, 3])))
    assert found["base_rate"] == pytest.approx(100 / 3) and found["asr"] == pytest.approx(200 / 3)


def test_without_an_attack_there_is_no_asr() -> None:
    none = np.array([], dtype=int)
    found = metrics(Predictions(np.array([0, 1]), np.array([0, 0]), none, none, none))
    assert found["acc"] == 50 and found["asr"] is None and found["ra"] is None


def test_wilson_against_a_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 gives 0.2553 to 0.3662.
    assert wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    low, high = wilson(0, 100)
    assert low == 0 and 0 < high < 5


def test_triggered_set_excludes_the_target_class_and_evaluates_each_image() -> None:
    from attacks import badnets
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8, generator=rng)
    labels = torch.arange(30) % 10
    settings = badnets.Config(target=3)
    test = triggered_test_set(images, labels, 10, "badnets", settings, {}, 0)
    assert test.index.tolist() == [i for i in range(30) if i % 10 != 3]
    assert set(test.wanted.tolist()) == {3}
    assert torch.equal(test.triggered, badnets.apply(images[test.index], settings, {}, 0, "test"))
    found = evaluate(build("wrn-10-1", 10, 0).eval(), test)
    assert found.clean.shape == (30,) and found.triggered.shape == (27,)
    every = triggered_test_set(images, labels, 10, "badnets", badnets.Config(labels="all-to-all"), {}, 0)
    assert len(every.index) == 30 and torch.equal(every.wanted, (labels + 1) % 10)
