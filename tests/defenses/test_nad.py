"""NAD: its losses against numbers of the official code, and what must coincide with what."""

from dataclasses import replace

import pytest
import torch

from defenses import nad
from reproduce.data.augment import to_input
from reproduce.errors import UserError
from reproduce.models import build
from reproduce.training import silent

SHAPES = ((4, 16, 8, 8), (4, 32, 4, 4), (4, 64, 2, 2))

# AT(p)(wave(shape, 0.7), wave(shape, 1.3)) of bboylyg/NAD@f17b713 (at.py), torch 2.15 on a CPU.
OFFICIAL = {
    (0, 1.0): 6.485763879027218e-05, (0, 2.0): 3.0448863981291652e-05, (0, 3.0): 0.00012550146493595093,
    (1, 1.0): 5.024507117923349e-06, (1, 2.0): 8.107226676656865e-06, (1, 3.0): 1.55261586769484e-05,
    (2, 1.0): 6.0263278101047035e-06, (2, 2.0): 7.222056410682853e-06, (2, 3.0): 1.1540401828824542e-05,
}
# AT(2.0).attention_map(wave(SHAPES[0], 0.7))[1, 0, 2, :4], likewise.
OFFICIAL_MAP = (0.1272071897983551, 0.12063772976398468, 0.12131964415311813, 0.12812092900276184)


def wave(shape, step):
    """A tensor every version of torch agrees on."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * step).float().view(shape)


def plain_map(feature, attention, p=2.0):
    """The definition, written out: unit-norm attention (N, H * W)."""
    size = feature.abs() if attention == "sum" else feature.abs() ** p
    size = {"sum": size.sum(1), "sum-p": size.sum(1), "mean-p": size.mean(1), "max-p": size.amax(1)}[attention]
    return size.flatten(1) / size.flatten(1).norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("index", "p"), OFFICIAL)
def test_attention_loss_is_the_official_one(index, p):
    ours = nad.attention_loss(wave(SHAPES[index], 0.7), wave(SHAPES[index], 1.3), p=p)
    assert ours.item() == pytest.approx(OFFICIAL[index, p], rel=1e-4, abs=1e-9)


def test_attention_map_is_the_official_one():
    unit = nad.unit(nad.attention_map(wave(SHAPES[0], 0.7)))
    torch.testing.assert_close(unit.view(4, 8, 8)[1, 2, :4], torch.tensor(OFFICIAL_MAP), atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["sum", "sum-p", "mean-p", "max-p"])
@pytest.mark.parametrize("norm", ["mse", "l2"])
def test_attention_loss_follows_its_definition(attention, norm):
    a, b = wave(SHAPES[1], 0.7), wave(SHAPES[1], 1.3)
    difference = plain_map(a, attention) - plain_map(b, attention)
    expected = (difference ** 2).mean() if norm == "mse" else difference.norm(dim=1).mean()
    assert nad.attention_loss(a, b, attention, 2.0, norm).item() == pytest.approx(expected.item(), rel=1e-4)


def test_sum_and_mean_are_the_same_map_once_scaled():
    # Features of a realistic size: the mean is C times nearer to the epsilon in the norm.
    feature = 10 * wave(SHAPES[2], 0.7)
    sums, means = (nad.unit(nad.attention_map(feature, kind)) for kind in ("sum-p", "mean-p"))
    torch.testing.assert_close(sums, means, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["mse", "l2"])
def test_gradient_is_the_derivative_and_finite_where_student_equals_teacher(norm):
    a, b = wave(SHAPES[2], 0.7).requires_grad_(), wave(SHAPES[2], 1.3)
    direction, h = wave(SHAPES[2], 2.1), 1e-2
    gradient, = torch.autograd.grad(nad.attention_loss(a, b, norm=norm), a)
    with torch.no_grad():
        rise = nad.attention_loss(a + h * direction, b, norm=norm) - nad.attention_loss(a - h * direction, b, norm=norm)
    assert (gradient * direction).sum().item() == pytest.approx(rise.item() / (2 * h), rel=0.05, abs=1e-6)
    for feature in (a, torch.zeros_like(a, requires_grad=True)):
        same, = torch.autograd.grad(nad.attention_loss(feature, feature.detach(), norm=norm), feature)
        assert same.isfinite().all()


def test_maps_of_other_sizes_and_widths_are_pooled():
    a, b = wave((2, 16, 4, 4), 0.7), wave((2, 8, 8, 8), 1.3)
    pooled = nad.attention_map(b).view(2, 4, 2, 4, 2).mean((2, 4))
    expected = (nad.unit(nad.attention_map(a)) - nad.unit(pooled)).square().mean()
    assert nad.attention_loss(a, b).item() == pytest.approx(expected.item(), rel=1e-5)


def test_feature_distillation_needs_equal_shapes():
    a, b = wave(SHAPES[1], 0.7), wave(SHAPES[1], 1.3)
    assert nad.feature_loss(a, b).item() == pytest.approx(((a - b) ** 2).mean().item())
    with pytest.raises(UserError, match="equal shapes"):
        nad.feature_loss(a, b[:, :5])


@pytest.mark.parametrize("variant", ["released", "described"])
def test_detached_distillation_is_exactly_no_distillation(variant, victim, clean, shorten, same):
    config = shorten(nad.SETTINGS["nad", variant], epochs=2)
    detached, control, full = (nad.defend(victim, clean, c, 7).model for c in (
        replace(config, detach=True), nad.without_distillation(config), config))
    assert same(detached, control)
    assert not same(full, control)


def test_without_distillation_makes_no_teacher(victim, clean, shorten):
    phases = []
    config = replace(shorten(nad.Config()), teacher="clean")
    assert nad.requires(config) == {"clean-model"}
    control = nad.without_distillation(config)
    assert nad.requires(control) == frozenset()
    nad.defend(victim, clean, control, 7, observe=lambda phase, *_: phases.append(phase))
    assert phases == ["student"]


def test_records_each_weighted_term(victim, clean, shorten):
    rows = []
    config = replace(shorten(nad.Config()), betas=(500.0, 0.0, 1000.0))
    nad.defend(victim, clean, config, 7, observe=lambda phase, *rest: rows.append((phase, rest[-1])))
    row = dict(rows)["student"]
    assert {"ce", "attention.block1", "attention.block3"} <= row.keys() and "attention.block2" not in row
    assert row["loss"] == pytest.approx(row["ce"] + row["attention.block1"] + row["attention.block3"], rel=1e-5)


def test_teachers(victim, clean, shorten, same):
    config = shorten(nad.Config())
    other = build("wrn-10-2", 10, seed=1)
    made = {kind: nad.make_teacher(victim, clean, replace(config, teacher=kind), 7, silent, other)
            for kind in ("finetune", "victim", "scratch", "clean")}
    assert same(made["victim"], victim) and same(made["clean"], other)
    assert not same(made["finetune"], victim) and not same(made["scratch"], made["finetune"])
    for teacher in made.values():
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert type(made["scratch"]) is type(victim)
    assert [p.shape for p in made["scratch"].parameters()] == [p.shape for p in victim.parameters()]


def test_scratch_teacher_does_not_start_where_the_victim_did(victim, clean):
    fresh = nad._untrained(victim, clean, None, seed=0)
    assert not torch.equal(fresh.conv1.weight, build("wrn-10-1", 10, seed=0).conv1.weight)


@pytest.mark.parametrize("architecture", ["wrn-10-2", "wrn-16-1"])
def test_a_teacher_of_another_architecture_teaches(architecture, victim, clean, shorten, same):
    config = replace(shorten(nad.Config()), teacher="scratch", teacher_model=architecture)
    student = nad.defend(victim, clean, config, 7).model
    assert not same(student, nad.defend(victim, clean, nad.without_distillation(config), 7).model)


def test_the_teacher_is_not_trained_by_the_student(victim, clean, shorten, same):
    other = build("wrn-10-1", 10, seed=1)
    before = nad.deepcopy(other)
    nad.defend(victim, clean, replace(shorten(nad.Config()), teacher="clean"), 7, clean_model=other)
    assert same(other, before) and other.training


@pytest.mark.parametrize("changes", [{"betas": (1.0,)}, {"teacher_model": "wrn-16-1"}])
def test_contradictory_settings_are_refused(changes):
    with pytest.raises(UserError):
        replace(nad.Config(), **changes)


def test_without_names_the_models_last_layers_are_tapped(victim, clean, shorten):
    rows = []
    config = shorten(nad.SETTINGS["fmp", "described"])
    nad.defend(victim, clean, config, 5, observe=lambda *heard: rows.append(heard))
    assert {name for name in rows[-1][-1] if "attention" in name} == {"attention.block2", "attention.block3"}
    assert nad.tapped(build("resnet-18", 10, seed=0), config) == ("layer3", "layer4")
    with pytest.raises(UserError, match="4 betas"):
        nad.defend(victim, clean, replace(config, betas=(1.0,) * 4), 5)


def test_the_bench_sets_the_students_rate_by_hand():
    # adjust_learning_rate of huangd1999/BackdoorBench@6135839, defense/nad/nad.py:118-129, at lr 0.01.
    rates = [nad.SETTINGS["fmp", "described"].recipe.rate(epoch) for epoch in range(100)]
    assert rates == [0.01] * 20 + [1e-4] * 80


def test_a_missing_clean_model_is_named(victim, clean, shorten):
    with pytest.raises(UserError, match="clean model"):
        nad.defend(victim, clean, replace(shorten(nad.Config()), teacher="clean"), 7)


def test_a_resnet_needs_layers_of_its_own(clean):
    student, teacher = (build("resnet-18", 10, seed=seed) for seed in (0, 1))
    images, labels = to_input(clean.images[:8]), clean.labels[:8]
    loss = nad.distillation(teacher.eval(), nad.Config(layers=student.taps, betas=(500.0,) * 4))
    terms = loss(student, images, labels).terms
    assert [name for name in terms if name != "ce"] == [f"attention.layer{i}" for i in (1, 2, 3, 4)]
    assert all(value > 0 for value in terms.values())
    with pytest.raises(UserError, match="no layer block1, block2, block3: choose from layer1, layer2, layer3, layer4"):
        nad.distillation(teacher, nad.Config())(student, images, labels)
