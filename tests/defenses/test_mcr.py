"""Mode Connectivity Repair: the curve, its training, the BatchNorm statistics, the choice of t."""

from dataclasses import replace

import pytest
import torch

from defenses import mcr
from reproduce.data.augment import Augment, to_input
from reproduce.defending import split_validation
from reproduce.models import build
from reproduce.training import train

KINDS = ("bezier", "polychain")


def curve(victim, config, images=100, seed=5):
    return mcr.Curve(victim, build("wrn-10-1", 10, seed=1), config, images, seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("points", [3, 4])
def test_ends_are_the_endpoints_exactly(kind, points, victim, clean, shorten):
    made = curve(victim, replace(shorten(mcr.Config()), curve=kind, points=points))
    with torch.no_grad():
        made.bends.normal_()
    for t, model in ((0.0, victim), (1.0, build("wrn-10-1", 10, seed=1))):
        at = made.model_at(t, clean.images)
        assert type(at) is type(victim) and not at.training
        for ours, expected in zip(at.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, expected)
        measured = mcr.deepcopy(model)
        with torch.no_grad():
            mcr.measure_batch_norm(measured, clean.images)
        assert torch.equal(at.bn1.running_mean, measured.bn1.running_mean)


def test_curves_follow_their_formulas(victim, shorten):
    t = torch.tensor(0.3)
    for kind, expected in (("bezier", (0.49, 0.42, 0.09)), ("polychain", (0.4, 0.6, 0.0))):
        made = curve(victim, replace(shorten(mcr.Config()), curve=kind))
        with torch.no_grad():
            made.bends.normal_()
        a, b, c = made.ends[0], made.bends[0], made.ends[1]
        point = expected[0] * a + expected[1] * b + expected[2] * c
        torch.testing.assert_close(made.weights(t), point, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_straight(kind, victim, shorten):
    made = curve(victim, replace(shorten(mcr.Config()), curve=kind, points=4))
    middle = torch.lerp(made.ends[0], made.ends[1], 0.5)
    torch.testing.assert_close(made.weights(torch.tensor(0.5)), middle, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_bends_are_trained_and_every_step_has_its_own_t(kind, victim, clean, shorten):
    config = replace(shorten(mcr.Config(), epochs=2), curve=kind)
    made = curve(victim, config)
    ends, bends, frame = made.ends.clone(), made.bends.detach().clone(), [p.clone() for p in made.frame.parameters()]
    rows = train(made, clean.images, clean.labels, config.recipe, 5, phase="curve", loss=mcr.curve_loss)
    assert torch.equal(made.ends, ends) and not torch.equal(made.bends, bends)
    assert all(torch.equal(a, b) for a, b in zip(made.frame.parameters(), frame, strict=True))
    assert made.step.item() == 2 * 4 == len(made.draws) == len(set(made.draws.tolist()))
    assert made.draws.min() >= 0 and made.draws.max() <= 1
    assert rows[0]["loss"] > rows[0]["ce"]


def test_the_bend_gets_the_gradient_of_the_interpolated_weights(victim, clean, shorten):
    """By the chain rule: the coefficient of the bend, 2 t (1 - t), times the gradient of a plain model at w(t)."""
    made = curve(victim, shorten(replace(mcr.Config(), weight_decay=0.0)))
    images, labels = to_input(clean.images[:8]), clean.labels[:8]
    made.eval()
    t = made.draws[0].item()
    gradient, = torch.autograd.grad(mcr.curve_loss(made, images, labels).total, made.bends)
    plain = mcr.deepcopy(made.frame).requires_grad_(True).eval()
    parts = mcr._unflatten(made.weights(torch.tensor(t)).detach(), plain)
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(parts[name])
    torch.nn.functional.cross_entropy(plain(images), labels).backward()
    expected = 2 * t * (1 - t) * mcr._flatten(p.grad for p in plain.parameters())
    torch.testing.assert_close(gradient[0], expected, atol=1e-5, rtol=1e-3)


def test_batch_norm_statistics_are_measured_anew(victim, clean):
    model, momenta = mcr.deepcopy(victim), [0.1] * 3
    torch.nn.init.constant_(model.bn1.running_mean, 1e6)
    seen = []
    model.bn1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        mcr.measure_batch_norm(model, clean.images, batch=40)   # 40, 40 and 20 images
    torch.testing.assert_close(model.bn1.running_mean, torch.cat(seen).mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    assert [m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)][:3] == momenta


def test_t_is_nearest_the_middle_among_the_good():
    assert mcr.choose_t({0.0: 90.0, 0.25: 89.0, 0.5: 70.0, 0.75: 80.0, 1.0: 88.0}, 4.0) == 0.25
    assert mcr.choose_t({0.0: 90.0, 0.25: 89.0, 0.5: 86.0, 0.75: 80.0, 1.0: 88.0}, 4.0) == 0.5


def test_reports_t(victim, clean, shorten):
    chosen = mcr.defend(victim, clean, shorten(mcr.Config()), 5).info
    assert [t for t, _ in chosen["validation_acc"]] == pytest.approx([i / 10 for i in range(11)])
    assert chosen["t"] == mcr.choose_t(dict(chosen["validation_acc"]), 4.0)
    assert mcr.defend(victim, clean, replace(shorten(mcr.Config()), t=0.1), 5).info == {"t": 0.1}


def test_released_rates_are_the_official_schedule():
    def official(epoch, epochs):    # IBM/model-sanitization@1eff7e9 train.py:117-125, as a formula
        alpha = epoch / epochs
        return 1.0 if alpha <= 0.5 else 1.0 - (alpha - 0.5) / 0.4 * 0.99 if alpha <= 0.9 else 0.01

    recipe = mcr.RELEASED
    for epoch in range(recipe.epochs):
        assert recipe.rate(epoch) == pytest.approx(0.01 * official(epoch + 1, recipe.epochs), rel=1e-4)


def test_its_own_training_shows_the_images_over_and_over_without_augmentation(victim, clean, shorten, monkeypatch):
    """As many an epoch as asked for and no fewer than there are, each in its turn, and as many t as there are steps."""
    own = mcr.SETTINGS["mcr", "released"]
    assert own.recipe == replace(mcr.RELEASED, augment=Augment()) and own.epoch_images == 10_000
    config, seen = shorten(own), []

    def recorded(model, images, labels, *args, **kwargs):
        seen.append((model, images, labels))
        return train(model, images, labels, *args, **kwargs)

    monkeypatch.setattr(mcr, "train", recorded)
    for wanted, shown in ((200, 200), (50, 80)):
        mcr.defend(victim, clean, replace(config, epoch_images=wanted), 5)
        made, images, labels = seen.pop()
        part, _ = split_validation(clean, config.validation, 5)
        turns = [i % 80 for i in range(shown)]
        assert torch.equal(images, part.images[turns]) and torch.equal(labels, part.labels[turns])
        assert made.step.item() == len(made.draws) == -(-shown // 32)
