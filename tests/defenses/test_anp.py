"""ANP: its mask training against numbers of the official code, what pruning does, and what the threshold may see."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defenses import anp
from reproduce.data.augment import Augment, to_input
from reproduce.errors import UserError
from reproduce.training import predict, train
from tests.defenses.tiny import tiny_batches, tiny_net, wave

# mask_train of csdongxian/ANP_backdoor@ec7b179 (optimize_mask_cifar.py:172-218), torch 2.15 on a CPU, three steps on
# tiny_net(nn.ReLU) with models/anp_batchnorm.py's layers; its random starts replaced by 0.4 wave((3, 2, 10), 1.1).
OFFICIAL_MASK = (0.954174, 1.0, 1.0, 0.982078, 0.955592, 0.382736, 0.636209, 1.0, 1.0, 0.932501)
OFFICIAL_LOSSES = (2.6812596321105957, 2.814504384994507, 2.7812278270721436)
# The perturbation of its first step.
OFFICIAL_NOISE = (
    (-0.4, 0.756483, -0.076601, 0.336902, -0.780641, 0.117784, 0.524617, -0.004733, -0.166033, -0.583014),
    (-0.399996, 0.220141, -0.163171, 0.794709, 0.121247, 0.115286, 0.020462, 0.3404, 0.725469, 0.754863),
)


@pytest.fixture
def masked():
    made = anp.Masked(tiny_net(nn.ReLU), 0.4, 3, seed=0)
    made.starts.copy_(0.4 * wave((3, 2, 10), 1.1))
    return made


def accuracy(model, clean):
    return 100 * (predict(model, clean.images) == clean.labels).float().mean().item()


def test_mask_training_is_the_official_one(masked):
    images, labels = tiny_batches()
    recipe = replace(anp.RELEASED, batch=8, shuffle=False, augment=Augment())
    row, = train(masked, images.flatten(0, 1), labels.flatten(), recipe, 0, phase="mask",
                 loss=anp.mask_loss(anp.Config()), project=anp.clamp_mask)
    torch.testing.assert_close(masked.mask.detach(), torch.tensor(OFFICIAL_MASK), atol=1e-5, rtol=0)
    assert row["loss"] == pytest.approx(sum(OFFICIAL_LOSSES) / 3, rel=1e-5)


def test_perturbation_is_the_official_one(masked):
    images, labels = tiny_batches()
    noise = anp.perturb(masked.train(), to_input(images[0]), labels[0], anp.Config())
    torch.testing.assert_close(noise, torch.tensor(OFFICIAL_NOISE), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 4])
def test_perturbation_goes_up_the_loss_by_eps_at_most(steps, masked):
    images, labels = tiny_batches()
    masked.train()
    inputs, start = to_input(images[1]), masked.starts[0]
    noise = anp.perturb(masked, inputs, labels[1], anp.Config(eps=0.04, steps=steps))
    assert 0 < (noise - start).abs().max() <= 0.04 + 1e-6
    with torch.no_grad():
        before, after = (F.cross_entropy(masked(inputs, p), labels[1]) for p in (start, noise))
    assert after > before


def test_starts_fill_the_box_and_none_is_used_twice():
    made = anp.Masked(tiny_net(nn.ReLU), 0.4, 50, seed=0)
    assert 0.39 < made.starts.max() <= 0.4 and -0.4 <= made.starts.min() < -0.39
    used = torch.stack([made.next_start() for _ in range(50)])
    assert torch.equal(used, made.starts) and len(used.unique()) > 990


def test_without_eps_only_the_natural_loss_is_left(masked):
    images, labels = tiny_batches()
    inputs = to_input(images[0])
    result = anp.mask_loss(anp.Config(eps=0.0))(masked.eval(), inputs, labels[0])
    assert result.total.item() == pytest.approx(0.2 * F.cross_entropy(masked(inputs), labels[0]).item())
    assert set(result.terms) == {"natural"} and masked.step.item() == 0


def test_a_mask_scales_the_batch_norms_and_nothing_else(masked):
    inputs = to_input(tiny_batches()[0][0])
    plain = tiny_net(nn.ReLU).eval()
    torch.testing.assert_close(masked.eval()(inputs), plain(inputs))
    with torch.no_grad():
        masked.mask.copy_(wave((10,), 1.0).abs())
        plain[1].weight.mul_(masked.mask[:4])
        plain[4].weight.mul_(masked.mask[4:])
    torch.testing.assert_close(masked(inputs), plain(inputs))
    assert [name for name, p in masked.named_parameters() if p.requires_grad] == ["mask"]


def test_pruned_channels_are_constant_and_the_rest_is_the_victims(victim):
    total = sum(norm.num_features for norm in anp.batch_norms(victim).values())
    channels = torch.arange(total) % 3 == 0
    model = anp.pruned(victim, channels)
    assert len(anp.batch_norms(model)) == 7 and type(model) is type(victim)
    seen = {}
    for name, norm in anp.batch_norms(model).items():
        norm.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output.clone()}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model(to_input(torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)))
    first, ours, theirs = 0, model.state_dict(), victim.state_dict()
    assert ours.keys() == theirs.keys()
    for name, norm in anp.batch_norms(model).items():
        gone = channels[first:first + norm.num_features]
        first += norm.num_features
        assert (norm.weight[gone] == 0).all() and torch.equal(norm.bias, theirs.pop(f"{name}.bias"))
        assert torch.equal(norm.weight[~gone], theirs.pop(f"{name}.weight")[~gone])
        spread = seen[name].std((0, 2, 3))
        assert (spread[gone] == 0).all() and (spread[~gone] > 0).any()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_threshold_is_chosen_on_images_held_out_of_the_training(victim, clean, shorten, monkeypatch):
    trained, predicted = [], []
    monkeypatch.setattr(anp, "train", lambda model, images, *rest, **options: trained.append(images))
    monkeypatch.setattr(anp, "predict", lambda model, images: predicted.append(images) or predict(model, images))
    part, held_out = anp.split_validation(clean, 0.2, 5)
    anp.defend(victim, clean, shorten(anp.Config()), 5)
    assert len(trained) == 1 and torch.equal(trained[0], part.images)
    assert len(predicted) == 20 and all(torch.equal(images, held_out.images) for images in predicted)
    trained.clear(), predicted.clear()
    anp.defend(victim, clean, shorten(anp.Config(threshold=anp.FIXED)), 5)
    assert torch.equal(trained[0], clean.images) and not predicted


def test_curve_is_the_accuracy_of_the_pruned_models(victim, clean):
    mask = wave((240,), 1.0).abs()
    curve = anp.pruning_curve(victim, mask, [0.05, 0.5], clean)
    models = (anp.deepcopy(victim).eval(), anp.pruned(victim, mask <= 0.05), anp.pruned(victim, mask <= 0.5))
    assert curve == pytest.approx([accuracy(model, clean) for model in models], abs=1e-4)


def test_grid_is_the_official_one():
    assert anp.thresholds(anp.Config()) == pytest.approx([0.05 * k for k in range(19)])


@pytest.mark.parametrize(("curve", "expected"), [
    ([90.0] * 20, 0.9), ([90.0] + [80.0] * 19, None), ([90.0, 90.0, 87.0, 85.0] + [90.0] * 16, 0.05)])
def test_stops_before_accuracy_first_falls_too_far(curve, expected, victim, clean, monkeypatch, same):
    mask = wave((240,), 1.0).abs()
    monkeypatch.setattr(anp, "train_mask", lambda *arguments: mask)
    monkeypatch.setattr(anp, "pruning_curve", lambda *arguments: curve)
    result = anp.defend(victim, clean, anp.Config(), 5)
    assert result.info["threshold"] == expected
    assert result.info["pruned"] == (0 if expected is None else (mask <= expected).sum())
    assert same(result.model, victim) == (expected is None)


@pytest.mark.parametrize(("relative", "expected"), [(False, 0.1), (True, 0.0)])
def test_a_relative_tolerance_is_a_share_of_the_victims_accuracy(relative, expected, victim, clean, monkeypatch):
    monkeypatch.setattr(anp, "train_mask", lambda *arguments: wave((240,), 1.0).abs())
    monkeypatch.setattr(anp, "pruning_curve", lambda *arguments: [50.0, 46.0, 44.0, 40.0] + [30.0] * 16)
    config = replace(anp.SETTINGS["fmp", "described"], relative=relative)
    assert config.tolerance == 10.0 and anp.SETTINGS["fmp", "described"].relative
    assert anp.defend(victim, clean, config, 5).info["threshold"] == expected


def test_the_mask_is_kept_so_that_other_thresholds_can_be_tried(victim, clean, shorten, same):
    fixed = anp.defend(victim, clean, shorten(anp.Config(threshold=0.9)), 5)
    other = anp.defend(victim, clean, shorten(anp.Config(threshold=0.8)), 5)
    assert fixed.info["pruned"] > other.info["pruned"]
    assert same(anp.pruned(victim, fixed.tensors["mask"] <= 0.8), other.model)


def test_reports_every_mask(victim, clean, shorten):
    rows = []
    result = anp.defend(victim, clean, shorten(anp.Config(threshold=0.9)), 5,
                        observe=lambda phase, epoch, epochs, model, row: rows.append((phase, epoch, epochs, row)))
    masks = result.info["masks"]
    assert masks == sorted(masks) and len(masks) == result.info["channels"] == 240
    assert masks[0] >= 0 and masks[-1] <= 1 and result.info["pruned"] == sum(m <= 0.9 for m in masks) > 0
    assert [row[:3] for row in rows] == [("mask", k, 3) for k in range(1, 4)]     # 10 steps, 4 to a pass
    assert rows[0][3]["loss"] == pytest.approx(rows[0][3]["robust"] + rows[0][3]["natural"], rel=1e-5)


@pytest.mark.parametrize(("curve", "expected"), [
    ({}, None),                                                         # no threshold keeps accuracy
    ({0.0: (79.0, 60.0), 0.05: (75.0, 20.0), 0.1: (71.0, 5.0)}, 0.05),    # 71 has lost more than a tenth of 80
    ({0.2: (80.0, 30.0), 0.35: (80.0, 30.0)}, 0.2)])                    # the lowest of equals
def test_the_oracle_takes_the_lowest_test_asr_that_keeps_accuracy(curve, expected, victim, clean, same):
    mask = wave((240,), 1.0).abs()
    answers = iter([(80.0, 99.0), *(curve.get(threshold, (10.0, 0.0)) for threshold in anp.thresholds(anp.Config()))])
    granted = replace(clean, measured=lambda model: next(answers))
    result = anp.defend(victim, granted, anp.SETTINGS["mcldef", "oracle"], 5, base={"mask": mask})
    assert result.info["threshold"] == expected and len(result.info["test_curve"]) == 19
    assert same(result.model, victim) == (expected is None)
    if expected is not None:
        assert same(result.model, anp.pruned(victim, mask <= expected))


def test_the_oracle_is_refused_without_its_grants(victim, clean):
    oracle = anp.SETTINGS["mcldef", "oracle"]
    assert anp.requires(oracle) == {"test-asr"}
    assert anp.builds_on(oracle) == ("anp", anp.SETTINGS["mcldef", "described"])
    for granted, base in ((clean, {"mask": torch.ones(240)}), (replace(clean, measured=lambda model: (0, 0)), None)):
        with pytest.raises(UserError, match="test ASR"):
            anp.defend(victim, granted, oracle, 5, base=base)


def test_a_model_without_batch_norm_is_refused(clean):
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    with pytest.raises(UserError, match="BatchNorm"):
        anp.defend(model, clean, anp.Config(), 5)


@pytest.mark.parametrize("changes", [
    {"eps": -0.1}, {"steps": 0}, {"iterations": 0}, {"alpha": 1.5}, {"threshold": 1.0}, {"spacing": 0.0},
    {"highest": 1.0}, {"tolerance": -1.0}, {"validation": 0.0}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(UserError):
        replace(anp.Config(), **changes)
