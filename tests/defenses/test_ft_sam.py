"""FT-SAM: its steps against numbers of the official code, and what makes it more than fine-tuning."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defenses import ft, ft_sam
from reproduce.data.augment import Augment, to_input
from reproduce.defending import Clean
from reproduce.errors import UserError
from reproduce.models import build
from reproduce.training import Cosine
from tests.defenses.tiny import tiny_batches, tiny_net, wave

# SAM of SCLBD/BackdoorBench@f02e353 (utils/defense_utils/sam/sam.py, in the loop of defense/ft-sam.py:291-303), torch
# 2.15 on a CPU: six steps on tiny_net(nn.ReLU), rho 2, smoothing 0.1, lr 0.01 annealed with T_max 4, momentum 0.9,
# weight decay 5e-4. Mean loss of each pass over the three batches at the unperturbed weights, without the entropy of
# the smoothed label, which the official loss subtracts; then parameters and running statistics.
OFFICIAL_LOSSES = (2.363584036993163, 2.296809430288451)
OFFICIAL_SCALE = (1.496443, 2.218863, 2.497485, 2.178044)
OFFICIAL_BIAS = (-0.02379, 0.991855, 0.345334, -0.863213, -0.632585)
OFFICIAL_CONV = (-0.001474, 0.642804, 0.982857, 0.863511, 0.335931, -0.349704)
OFFICIAL_MEAN = (0.057984, 0.050967, 0.039898, 0.030992)
OFFICIAL_VARIANCE = (2.249924, 1.041998, 2.504258, 0.85966, 2.562791, 0.912704)
# The first step's e of net[1].weight and of the classifier's bias.
OFFICIAL_AWAY = ((0.174753, -0.362701, 0.332594, -0.201011), (0.0, -0.062742, -0.028316, -0.081243, 0.058324))

RECIPE = replace(ft_sam.RELEASED, epochs=2, batch=8, shuffle=False, augment=Augment())


@pytest.fixture
def tiny():
    images, labels = tiny_batches()
    return tiny_net(nn.ReLU), Clean(images.flatten(0, 1), labels.flatten(), 5)


def close(ours, official):
    torch.testing.assert_close(ours.detach().flatten()[:len(official)], torch.tensor(official), atol=2e-5, rtol=0)


def test_six_steps_are_the_official_ones(tiny):
    rows = []
    tuned = ft_sam.defend(*tiny, ft_sam.Config(annealed=4, recipe=RECIPE), 0,
                          lambda *heard: rows.append(heard[-1])).model
    assert [row["ce"] for row in rows] == pytest.approx(OFFICIAL_LOSSES, rel=1e-5)
    assert all(row["loss"] > row["ce"] for row in rows)     # e goes uphill
    for ours, official in ((tuned[1].weight, OFFICIAL_SCALE), (tuned[8].bias, OFFICIAL_BIAS),
                           (tuned[0].weight, OFFICIAL_CONV), (tuned[1].running_mean, OFFICIAL_MEAN),
                           (tuned[4].running_var, OFFICIAL_VARIANCE)):
        close(ours, official)
    assert tuned[1].num_batches_tracked == 6


def test_perturbation_is_the_official_one(tiny):
    net, clean = tiny
    weights = list(net.parameters())
    loss = ft_sam.smooth_cross_entropy(net(to_input(clean.images[:8])), clean.labels[:8], 0.1)
    away = ft_sam.perturbation(weights, loss, 2.0)
    close(away[1], OFFICIAL_AWAY[0])
    close(away[-1], OFFICIAL_AWAY[1])
    # Its length, each weight measured by its own size, is rho.
    # A weight of 0 stays where it is.
    moves = torch.cat([(e / weight).nan_to_num().flatten() for e, weight in zip(away, weights, strict=True)])
    assert moves.norm().item() == pytest.approx(2.0, rel=1e-5)


def test_the_gradient_is_that_at_the_perturbed_weights(tiny):
    net, clean = tiny
    images, labels = to_input(clean.images[:8]), clean.labels[:8]
    other = tiny_net(nn.ReLU)
    away = ft_sam.perturbation(list(other.parameters()), ft_sam.smooth_cross_entropy(other(images), labels, 0.1), 2.0)
    with torch.no_grad():
        for weight, e in zip(other.parameters(), away, strict=True):
            weight.add_(e)
    ft_sam.smooth_cross_entropy(other(images), labels, 0.1).backward()
    ft_sam.sharpness(net, images, labels, 2.0, 0.1).total.backward()
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    assert net[1].num_batches_tracked == 1 and other[1].num_batches_tracked == 2


def test_without_rho_and_smoothing_it_is_fine_tuning(victim, clean):
    recipe = replace(RECIPE, batch=32)
    tuned = ft_sam.defend(victim, clean, ft_sam.Config(0.0, 0.0, None, recipe), 5).model
    plain = ft.fine_tune(victim, clean, recipe, 5, phase="sharpness")
    for ours, theirs in zip(tuned.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("classes", [2, 5, 43])
def test_smoothing_is_the_official_one(classes):
    logits, labels = 3 * wave((6, classes), 0.9), torch.arange(6) % classes
    wanted = torch.full((6, classes), 0.1 / (classes - 1)).scatter_(1, labels[:, None], 0.9)
    ours = ft_sam.smooth_cross_entropy(logits, labels, 0.1).item()
    assert ours == pytest.approx(-(wanted * F.log_softmax(logits, 1)).sum(1).mean().item(), rel=1e-5)


def test_the_rate_goes_down_and_up_from_step_to_step():
    model = build("wrn-10-1", 10, seed=0)
    (optimizer,) = ft_sam.annealed_sgd(model, RECIPE, 100)
    official = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(official, T_max=100)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 7.0       # what the training loop writes there
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(official.param_groups[0]["lr"], abs=1e-9), step
        official.step()
        scheduler.step()


def test_settings_anneal_as_they_say():
    assert ft_sam.SETTINGS["ft_sam", "released"].recipe == replace(ft.BENCH, cosine=None)
    assert ft_sam.SETTINGS["ft_sam", "described"].recipe.cosine == Cosine(100)
    # What the official parser makes of its gtsrb.yaml: rho 2.0 and smoothing 0.1 from its own defaults, epochs from it.
    assert ft_sam.SETTINGS["ft_sam", "released-gtsrb"] == ft_sam.Config(recipe=replace(ft_sam.RELEASED, epochs=50))
    assert {(config.rho, config.smoothing) for config in ft_sam.SETTINGS.values()} == {(2.0, 0.1)}


@pytest.mark.parametrize("changes", [
    {"rho": -1.0}, {"smoothing": 0.6}, {"annealed": 0}, {"recipe": ft.BENCH}, {"recipe": ft.RELEASED}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(UserError, match="FT-SAM"):
        replace(ft_sam.Config(), **changes)
