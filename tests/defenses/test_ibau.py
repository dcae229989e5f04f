"""I-BAU: its hypergradient against a closed form and the official code, and what is perturbed."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defenses import ibau
from reproduce.data.augment import to_input
from reproduce.errors import UserError
from tests.defenses.tiny import tiny_batches, tiny_net, wave

# YiZeng623/I-BAU@d4bfa52, torch 2.15 on a CPU, on tiny_net(nn.ELU) in eval mode and tiny_batches(): the perturbation
# of one pass (defense.py:221-233), its norm and first values.
OFFICIAL_NORM = 40.73944091796875
OFFICIAL_PERTURBATION = (-0.24632646143436432, -0.9271964430809021, -1.6385691165924072, -1.5743522644042969)
# hypergrad.fixed_point there, for the second batch with images 2 and 5 patched by that perturbation at norm 1: by K,
# the norm of the gradient of each parameter, and the gradient of the last one. Without the implicit part the norms are
# 15.914, 3.678, 2.719, 12.006, 2.109, 0.838, 2.741, 0.521.
OFFICIAL_NORMS = {
    1: (16.3449879, 4.0174599, 2.7827091, 12.6409235, 2.3913157, 0.8767552, 3.0451424, 0.5546973),
    5: (20.6858711, 5.1772981, 3.3480222, 15.8903961, 3.547245, 1.0522397, 4.412322, 0.707084),
}
OFFICIAL_LAST = {
    1: (0.06597303599119186, 0.45242488384246826, -0.1247309148311615, -0.2497663050889969, -0.14390067756175995),
    5: (-0.032815322279930115, 0.6147860288619995, -0.12541161477565765, -0.25039142370224, -0.20616760849952698),
}
OFFICIAL_LOSS = 5.190864562988281


def test_perturbation_is_the_official_one():
    perturbation = ibau.universal_perturbation(tiny_net(nn.ELU).eval(), list(tiny_batches()[0]), ibau.Config())
    assert perturbation.shape == (3, 8, 8) and perturbation.norm().item() == pytest.approx(OFFICIAL_NORM, rel=1e-4)
    torch.testing.assert_close(perturbation.flatten()[:4], torch.tensor(OFFICIAL_PERTURBATION), atol=1e-4, rtol=0)


@pytest.mark.parametrize("terms", OFFICIAL_NORMS)
def test_hypergradient_is_the_official_one(terms):
    net, config, (images, labels) = tiny_net(nn.ELU).eval(), ibau.Config(), tiny_batches()
    d = ibau.confine(ibau.universal_perturbation(net, list(images), config), 1.0)
    loss, gradients = ibau.hypergradient(
        ibau.inner_loss(net, images[0], labels[0], config.penalty),
        ibau.outer_loss(net, images[1], labels[1], torch.tensor([2, 5])), d, list(net.parameters()), config.step, terms)
    assert loss.item() == pytest.approx(OFFICIAL_LOSS, rel=1e-5)
    assert [g.norm().item() for g in gradients] == pytest.approx(OFFICIAL_NORMS[terms], rel=1e-4)
    torch.testing.assert_close(gradients[-1], torch.tensor(OFFICIAL_LAST[terms]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("terms", [1, 2, 5, 2000])
def test_hypergradient_of_a_quadratic_is_the_closed_form(terms):
    """I = d'Ad/2 - d'Bw has d(w) = A^-1 B w, so O = |d - t|^2/2 + c'w has the gradient B'A^-1 (d - t) + c."""
    root = torch.tensor([[2.0, 0.3, 0.0], [0.1, 1.5, 0.4], [0.0, 0.2, 1.0]], dtype=torch.float64)
    a, b = root @ root.T, wave((3, 2), 0.9).double()
    c, t, step = torch.tensor([0.5, -2.0]).double(), torch.tensor([1.0, -1.0, 0.5]).double(), 0.1
    w = torch.tensor([0.7, -0.4]).double().requires_grad_()
    d = torch.linalg.solve(a, b @ w).detach()
    loss, (gradient,) = ibau.hypergradient(
        lambda d: d @ a @ d / 2 - d @ b @ w, lambda d: (d - t).square().sum() / 2 + c @ w, d, [w], step, terms)
    contraction = torch.eye(3).double() - step * a
    series = sum(torch.linalg.matrix_power(contraction, k) @ (d - t) for k in range(min(terms, 300)))
    torch.testing.assert_close(gradient, step * b.T @ series + c)
    exact = b.T @ torch.linalg.solve(a, d - t) + c
    assert torch.allclose(gradient, exact, rtol=1e-6) == (terms == 2000)
    assert loss.item() == pytest.approx(((d - t).square().sum() / 2 + c @ w).item())


def test_hypergradient_leaves_the_model_alone():
    net, (images, labels) = tiny_net(nn.ELU).eval(), tiny_batches()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ibau.hypergradient(ibau.inner_loss(net, images[0], labels[0], 1e-3),
                       ibau.outer_loss(net, images[1], labels[1], torch.tensor([0])), torch.ones(3, 8, 8),
                       list(net.parameters()), 0.1, 3)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_only_the_patched_images_carry_the_perturbation():
    net, (images, labels), d = tiny_net(nn.ELU).eval(), tiny_batches(), wave((3, 8, 8), 0.3)
    inputs = to_input(images[1]).clone()
    inputs[[2, 5]] += d
    ours = ibau.outer_loss(net, images[1], labels[1], torch.tensor([2, 5]))(d)
    assert ours.item() == pytest.approx(F.cross_entropy(net(inputs), labels[1]).item(), rel=1e-6)


def test_confine():
    d = wave((3, 8, 8), 0.3)
    assert ibau.confine(d, 2.0).norm().item() == pytest.approx(2.0, rel=1e-5)
    assert torch.equal(ibau.confine(d, 100.0), d) and torch.equal(ibau.confine(0 * d, 2.0), 0 * d)


@pytest.mark.parametrize(("radius", "portion", "patched"), [(0.5, 0.1, (4, 2)), (None, 0.01, (1, 1))])
def test_each_batch_sees_the_confined_perturbation_on_its_share_of_images(radius, portion, patched, victim, clean,
                                                                          monkeypatch):
    norms, counts, hypergradient, outer_loss = [], [], ibau.hypergradient, ibau.outer_loss

    def spy(inner, outer, d, *rest):
        norms.append(d.norm().item())
        return hypergradient(inner, outer, d, *rest)

    def count(model, images, labels, chosen):
        counts.append(len(chosen.unique()))
        return outer_loss(model, images, labels, chosen)

    monkeypatch.setattr(ibau, "hypergradient", spy)
    monkeypatch.setattr(ibau, "outer_loss", count)
    config = ibau.Config(rounds=1, batch=40, radius=radius, portion=portion)     # of 100 images: 40, 40 and 20
    found = ibau.defend(victim, clean, config, 5).info["perturbation"]
    assert found[0] > 0.5 and counts == [patched[0], patched[0], patched[1]]
    assert norms == pytest.approx([radius or found[0]] * 3, rel=1e-4)


def test_each_official_file_has_its_own_settings():
    assert ibau.SETTINGS["ibau", "released"] == ibau.Config(rounds=3, terms=5, batch=100, rate=1e-3, radius=None)
    assert ibau.SETTINGS["ibau", "notebook"] == ibau.Config(rounds=1, terms=5, batch=100, rate=1e-3, radius=10.0)
    assert ibau.SETTINGS["fmp", "described"] == ibau.Config(rounds=5, terms=5, batch=100, rate=1e-4, radius=None)


def test_trains_every_weight_and_no_statistic(victim, clean):
    rows = []
    result = ibau.defend(victim, clean, ibau.Config(rounds=2, batch=50), 5,
                         observe=lambda phase, epoch, epochs, model, row: rows.append((phase, epoch, epochs, row)))
    ours, theirs = dict(result.model.named_parameters()), dict(victim.named_parameters())
    assert not any(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.equal(a, b) for a, b in zip(result.model.buffers(), victim.buffers(), strict=True))
    assert [row[:3] for row in rows] == [("unlearning", 1, 2), ("unlearning", 2, 2)]
    assert [row[3]["perturbation"] for row in rows] == result.info["perturbation"]


def test_unlearning_makes_the_perturbation_harmless(victim, clean):
    """On images that all carry it: what it costs the victim it no longer costs the repaired model."""
    config = ibau.Config(rounds=3, batch=20, portion=0.5, rate=3e-3, radius=10.0)
    before = ibau.deepcopy(victim).eval()
    d = ibau.confine(ibau.universal_perturbation(before, list(clean.images.split(20)), config), config.radius)
    after = ibau.defend(victim, clean, config, 5).model
    with torch.no_grad():
        harmed, repaired = (ibau.inner_loss(model, clean.images, clean.labels, 0.0)(d) for model in (before, after))
    assert -repaired < -harmed


@pytest.mark.parametrize("changes", [
    {"rounds": 0}, {"batch": 0}, {"terms": 0}, {"radius": 0.0}, {"portion": 0.0}, {"portion": 1.5}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(UserError):
        replace(ibau.Config(), **changes)
