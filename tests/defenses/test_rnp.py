"""RNP: both trainings against numbers of the official code, when it stops forgetting, and what is pruned."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from defenses import anp, rnp
from reproduce.data.augment import Augment
from reproduce.defending import Clean
from reproduce.errors import UserError
from reproduce.protocols import PROFILES
from reproduce.training import predict
from tests.defenses.tiny import tiny_batches, tiny_net, wave

# bboylyg/RNP@eeae192, main.py, on tiny_net(nn.ReLU) and tiny_batches(), torch 2.15 on a CPU. train_step_unlearning
# (:31-50) with the optimiser of :203: loss and accuracy of two epochs, then net[1].weight and the classifier's bias.
OFFICIAL_UNLEARNING = ((2.446695407231649, 100 * 5 / 24), (2.7144988377889, 100 * 4 / 24))
OFFICIAL_SCALE = (1.504001, 2.212168, 2.50639, 2.170062)
OFFICIAL_BIAS = (0.049565, 0.980731, 0.30175, -0.89938, -0.615054)
# From there train_step_recovering (:52-74) with models/mask_batchnorm.py's layers and the optimiser of :253: losses of
# three epochs and the masks after them.
OFFICIAL_RECOVERING = (0.5718739628791809, 0.5297123988469442, 0.4739306370417277)
OFFICIAL_MASK = (0.831455, 1.0, 0.684682, 1.0, 0.811213, 0.128449, 0.567546, 1.0, 1.0, 0.887129)


def plain(recipe, epochs):
    return replace(recipe, epochs=epochs, batch=8, shuffle=False, augment=Augment())


CONFIG = rnp.Config(unlearning=plain(rnp.UNLEARNING, 5), recovering=plain(rnp.RECOVERING, 3))


@pytest.fixture
def tiny():
    images, labels = tiny_batches()
    return tiny_net(nn.ReLU), Clean(images.flatten(0, 1), labels.flatten(), 5)


def test_forgetting_is_the_official_one_and_ends_where_accuracy_has_fallen(tiny):
    net, clean = tiny
    rows = []
    unlearnt, accuracies = rnp.unlearn(net, clean, CONFIG, 0, lambda *heard: rows.append(heard))
    # Of at most five epochs two: the second is the first with no more than 20 %.
    assert accuracies == pytest.approx([accuracy for _, accuracy in OFFICIAL_UNLEARNING], abs=1e-4)
    assert [-row["loss"] for *_, row in rows] == pytest.approx([loss for loss, _ in OFFICIAL_UNLEARNING], rel=1e-5)
    torch.testing.assert_close(unlearnt[1].weight.detach(), torch.tensor(OFFICIAL_SCALE), atol=1e-5, rtol=0)
    torch.testing.assert_close(unlearnt[8].bias.detach(), torch.tensor(OFFICIAL_BIAS), atol=1e-5, rtol=0)


def test_recovery_is_the_official_one(tiny):
    net, clean = tiny
    rows = []
    unlearnt, _ = rnp.unlearn(net, clean, CONFIG, 0)
    mask = rnp.recover(unlearnt, clean, CONFIG, 0, lambda *heard: rows.append(heard))
    torch.testing.assert_close(mask, torch.tensor(OFFICIAL_MASK), atol=1e-4, rtol=0)
    assert [row["loss"] for *_, row in rows] == pytest.approx(OFFICIAL_RECOVERING, rel=1e-5)


def test_goes_on_to_the_last_epoch_where_nothing_is_forgotten(tiny):
    _, accuracies = rnp.unlearn(*tiny, replace(CONFIG, forgotten=0.0), 0)
    assert len(accuracies) == 5 and min(accuracies) > 0


def test_prunes_the_victim_and_not_the_unlearnt_model(victim, clean, shorten, same):
    config = replace(shorten(rnp.Config(), epochs=3), threshold=0.99)
    result = rnp.defend(victim, clean, config, 5)
    mask = result.tensors["mask"]
    assert 0 < (mask <= 0.99).sum() == result.info["pruned"] < len(mask) == result.info["channels"] == 240
    assert same(result.model, anp.pruned(victim, mask <= 0.99))
    assert result.info["masks"] == pytest.approx(sorted(mask.tolist()), abs=1e-4)
    assert 1 <= len(result.info["unlearning_acc"]) <= 3


def test_both_trainings_leave_the_held_out_images_alone(victim, clean, shorten, monkeypatch):
    trained, predicted, train = [], [], rnp.train
    monkeypatch.setattr(rnp, "train", lambda model, images, *rest, **options: trained.append(images) or train(
        model, images, *rest, **options))
    monkeypatch.setattr(anp, "predict", lambda model, images: predicted.append(images) or predict(model, images))
    part, held_out = rnp.split(clean, rnp.Config(), 5)
    result = rnp.defend(victim, clean, shorten(rnp.Config()), 5)
    assert len(trained) == 2 and all(torch.equal(images, part.images) for images in trained)
    assert len(predicted) == 20 and all(torch.equal(images, held_out.images) for images in predicted)
    assert len(part.images) + len(held_out.images) == len(clean.images)
    assert [threshold for threshold, _ in result.info["validation_curve"]] == anp.thresholds(rnp.Config())
    trained.clear(), predicted.clear()
    rnp.defend(victim, clean, replace(shorten(rnp.Config()), threshold=0.7), 5)
    assert all(torch.equal(images, clean.images) for images in trained) and not predicted


def test_both_trainings_see_no_more_images_than_the_official_ones_and_the_rest_holds_out(clean):
    count = len(clean.images)
    for config, trained in ((rnp.Config(), count - round(0.2 * count)), (rnp.Config(subset=20), 20),
                            (rnp.Config(threshold=0.7), count), (rnp.Config(subset=20, threshold=0.7), 20)):
        part, held_out = rnp.split(clean, config, 5)
        assert len(part.images) == trained
        assert held_out is None if config.threshold else len(held_out.images) == count - trained
    assert rnp.Config().subset == 500


def test_a_scale_that_cuts_recipes_leaves_those_of_500_images_whole():
    short = replace(PROFILES["cpu"], defense_epochs=10)     # as FMP's protocol has it
    assert short.defense(rnp.Config()) == rnp.Config() != PROFILES["quick"].defense(rnp.Config())


def test_masks_that_are_no_numbers_are_not_taken_for_a_model_with_nothing_to_prune(victim, clean, shorten):
    config = shorten(rnp.Config(), epochs=3)
    config = replace(config, forgotten=0.0, unlearning=replace(config.unlearning, rates=((0, 1e30),)))
    with pytest.raises(UserError, match=r"training diverged: loss is -?(nan|inf)"):
        rnp.defend(victim, clean, config, 5)


@pytest.mark.parametrize(("relative", "expected"), [(False, 0.0), (True, None)])
def test_stops_before_accuracy_first_falls_too_far(relative, expected, victim, clean, shorten, monkeypatch):
    monkeypatch.setattr(rnp, "recover", lambda *arguments: wave((240,), 1.0).abs())
    monkeypatch.setattr(anp, "pruning_curve", lambda *arguments: [50.0, 46.5] + [40.0] * 18)
    config = replace(shorten(rnp.Config()), relative=relative)
    assert rnp.defend(victim, clean, config, 5).info["threshold"] == expected


@pytest.mark.parametrize("changes", [
    {"subset": 0}, {"forgotten": -1.0}, {"forgotten": 101.0}, {"alpha": 0.0}, {"threshold": 1.0}, {"spacing": 0.0},
    {"highest": 1.0}, {"tolerance": -1.0}, {"validation": 0.0}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(UserError, match="RNP"):
        replace(rnp.Config(), **changes)
